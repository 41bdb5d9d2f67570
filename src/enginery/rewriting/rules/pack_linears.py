"""linear(x, W, b) = packed_linear(x, pack(W), N, b)   and   embedding(W, i) = packed_embedding(i, pack(W), K)

The CPU kernels read weights in panels (`enginery.ops.linear`). A head that shares its weight with the embedding takes
the embedding along, so that one copy serves both.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten

PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackLinears(PatternRewriter):
    pure = True
    root_layer = (aten.linear.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, weight, bias = layer.args
        if not weight.is_constant or weight.dtype not in PACKED_DTYPES or x.dtype != weight.dtype or x.is_constant:
            return None
        return ops.packed_linear(x, pack(weight), weight.shape[0], bias)


class PackTiedEmbedding(PatternRewriter):
    """embedding(W, i) = packed_embedding(i, pack(W), K) where W is packed for the head"""

    pure = True
    root_layer = (ops.pack_linear,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        (weight,) = layer.args
        lookups = [user for user in weight.users if user.op is aten.embedding.default and user.args[0] is weight]
        return {
            lookup: ops.packed_embedding(lookup.args[1], layer.output, weight.shape[1]) for lookup in lookups
        } or None


def pack(weight: Tensor) -> Tensor:
    """The packed form of a weight; the one that there is already, if there is."""
    made = next((user for user in weight.users if user.op is ops.pack_linear), None)
    return made.output if made is not None else ops.pack_linear(weight)
