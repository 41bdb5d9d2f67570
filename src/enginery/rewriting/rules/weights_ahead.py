"""linear(x, W₁) … linear(y(x), W₂)  =  linear(x, W₁, following=W₂) … linear(y(x), W₂)

While attention, norms and activations run between two linears, a GPU's memory idles: the first linear asks for the
weight of the second. Within one block of the network only, so that equal blocks stay equal.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter

REACH = 64
"""layers between the two, at most"""
_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


class WeightsAhead(PatternRewriter):
    root_layer = (ops.linear,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        if layer.arguments["following"] is not None:
            return None
        weight = _next_weight(layer)
        if weight is None:
            raise MatchFailure("no linear of its block follows")
        return layer.replace(following=weight)


def _next_weight(layer: Layer) -> Tensor | None:
    """Of the nearest linear that depends on this one, in the same block."""
    block = _block(layer)
    seen = {layer}
    front = deque(layer.users)
    while front and len(seen) < REACH:
        user = front.popleft()
        if user.op is ops.linear and _block(user) == block:
            return user.arguments["weight"]
        if user not in seen:
            seen.add(user)
            front.extend(user.users)
    return None


def _block(layer: Layer) -> str:
    match = _BLOCK.match(layer.module_path)
    return match[0] if match else ""
