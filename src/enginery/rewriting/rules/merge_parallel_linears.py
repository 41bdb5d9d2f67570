"""linear(x, W₁, b₁), linear(x, W₂, b₂), … = split(linear(x, cat(W₁, W₂, …), cat(b₁, b₂, …)))

Query, key and value; gate and up. One large product streams its weights faster than several small ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class MergeParallelLinears(PatternRewriter):
    pure = True
    root_layer = (aten.linear.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        if not _is_mergeable(layer):
            return None
        x, _, bias = layer.args
        siblings = [
            other
            for other in x.users
            if other.op is layer.op and other.args[0] is x and (other.args[2] is None) == (bias is None)
            and _is_mergeable(other) and other.args[1].dtype == layer.args[1].dtype
        ]  # fmt: skip
        if len(siblings) < 2 or layer is not siblings[0]:
            return None
        weights = [sibling.args[1] for sibling in siblings]
        joined = None if bias is None else torch.cat([sibling.args[2] for sibling in siblings])
        product = F.linear(x, torch.cat(weights), joined)
        parts = torch.split(product, [weight.shape[0] for weight in weights], dim=-1)
        return dict(zip(siblings, parts, strict=True))


def _is_mergeable(layer: Layer) -> bool:
    x, weight, bias = layer.args
    return weight.is_constant and not x.is_constant and (bias is None or bias.is_constant)
