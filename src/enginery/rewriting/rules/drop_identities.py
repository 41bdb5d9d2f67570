"""x · 1 = x / 1 = x − 0 = x¹ = x, and x + 0 = x for integers

(−0.0 + 0 is +0.0, so the last is not exact for floats.)
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class DropIdentities(PatternRewriter):
    pure = True
    root_layer = (aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.add.Tensor, aten.pow.Tensor_Scalar)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, number = layer.args[:2]
        if not isinstance(x, Tensor) and layer.op in (aten.mul.Tensor, aten.add.Tensor):
            x, number = number, x
        if not isinstance(x, Tensor) or isinstance(number, Tensor) or not _is_neutral(layer, x, number):
            return None
        same = layer.output.dtype == x.dtype and layer.output.shape == x.shape
        return x if same else None


def _is_neutral(layer: Layer, x: Tensor, number: Any) -> bool:
    if layer.op is aten.add.Tensor:
        return number == 0 and not x.dtype.is_floating_point
    return number == (0 if layer.op is aten.sub.Tensor else 1)
