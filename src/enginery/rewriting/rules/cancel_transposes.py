"""transpose(transpose(x, a, b), a, b) = x

`t`, `numpy_T` and `mT` of a matrix are transposes too, and a select goes before a transpose, so that pairs meet.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten

MATRIX_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)


class CancelTransposes(PatternRewriter):
    pure = True
    root_layer = (aten.transpose.int, *MATRIX_TRANSPOSES)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x = layer.inputs[0]
        if layer.op in MATRIX_TRANSPOSES:
            return x.transpose(0, 1) if x.rank == 2 else None
        dims = _dims(layer)
        if len(dims) == 1:
            return x
        inner = x.parent
        if inner is None or inner.op is not aten.transpose.int or _dims(inner) != dims:
            return None
        return inner.inputs[0]


class PermuteToTranspose(PatternRewriter):
    """permute(x, the identity but for a and b exchanged) = transpose(x, a, b)"""

    pure = True
    root_layer = (aten.permute.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, order = layer.args
        moved = [axis for axis, source in enumerate(order) if source % x.rank != axis]
        if not moved:
            return x
        return x.transpose(*moved) if len(moved) == 2 else None


class SelectBeforeTranspose(PatternRewriter):
    """select(transpose(x, a, b), d, i) = transpose(select(x, d', i), a', b')"""

    pure = True
    root_layer = (aten.select.int,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, dim, index = layer.args
        inner = x.parent
        if inner is None or inner.op is not aten.transpose.int:
            return None
        dim, dims = dim % x.rank, _dims(inner)
        source = inner.inputs[0]
        if dim not in dims:
            a, b = sorted(axis - (axis > dim) for axis in dims)
            return source.select(dim, index).transpose(a, b)
        (other,) = dims - {dim}
        if abs(other - dim) != 1:
            return None  # the axes between the two would move
        return source.select(other, index)


def _dims(layer: Layer) -> set[int]:
    x, a, b = layer.args
    return {a % x.rank, b % x.rank}
