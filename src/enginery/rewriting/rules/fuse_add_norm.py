"""s = x + r, w · s / √(mean(s²) + ε) = add_rms_norm(x, r, w, ε)

The sum is an output of the operator, too: the residual stream goes on with it. A norm at the start of a decoder layer
takes the addition that ends the layer before. The operator rounds once where models round before the weight, too.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.constraints import same_type
from enginery.rewriting.pattern import Const, Scalar, Through, Var
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten


def _pattern() -> Any:
    total = (Var("x") + Var("residual")).bind("total")
    wide: Any = Through(total, casts=True)
    mean = (wide**2).mean([-1], True)
    return Const("weight", rank=1) * Through(wide * torch.rsqrt(mean + Scalar("eps")), casts=True)


class FuseAddNorm(PatternRewriter):
    pattern = _pattern()
    where: Any = (same_type("x", "residual"),)

    def rewrite(self, root: Layer, total: Layer, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        result = _in_dtype(root, x.dtype)
        if weight.shape != x.shape[-1:] or total.output.dtype != x.dtype:
            raise MatchFailure("the weight is not one number per feature")
        normed, added = ops.add_rms_norm(x, residual, weight, eps)
        return {result: normed, total: added}


def _in_dtype(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer, or the cast behind it, whose result has that dtype: some models multiply by the weight in float32."""
    users = layer.output.users
    if layer.output.dtype != dtype and len(users) == 1 and users[0].op is aten.to.dtype:
        (layer,) = users
    if layer.output.dtype != dtype:
        raise MatchFailure("the norm's result has another dtype than the sum")
    return layer
