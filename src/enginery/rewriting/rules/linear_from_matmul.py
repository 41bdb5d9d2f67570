"""x·C = linear(x, Cᵀ),  addmm(b, x, C) = linear(x, Cᵀ, b),  linear(x, W) + b = linear(x, W, b)   for constants C and b

GPT-2 stores its weights transposed; here they become linears like all others, the transpose done once, at bind time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class LinearFromMatmul(PatternRewriter):
    pure = True
    root_layer = (aten.matmul.default, aten.mm.default, aten.addmm.default)

    def match_and_rewrite(self, layer: Layer) -> Any:
        bias = None
        if layer.op is aten.addmm.default:
            bias, x, matrix, beta, alpha = layer.args
            if beta != 1 or alpha != 1 or not bias.is_constant or bias.shape != matrix.shape[1:]:
                return None
        else:
            x, matrix = layer.args
        if not matrix.is_constant or matrix.rank != 2 or x.is_constant:
            return None
        return F.linear(x, matrix.transpose(0, 1), bias)


class BiasIntoLinear(PatternRewriter):
    """linear(x, W) + b = linear(x, W, b)"""

    pure = True
    root_layer = (aten.add.Tensor,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        first, second, alpha = layer.args
        if isinstance(second, Tensor) and alpha == 1:
            pairs: Any = ((first, second), (second, first))
            for product, bias in pairs:
                linear = product.parent
                if linear is not None and linear.op is aten.linear.default and _takes(linear, bias):
                    x, weight, _ = linear.args
                    return F.linear(x, weight, bias)
        return None


def _takes(linear: Layer, bias: Tensor) -> bool:
    _, weight, old = linear.args
    fits = bias.is_constant and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype
    return fits and old is None and len(linear.output.users) == 1
