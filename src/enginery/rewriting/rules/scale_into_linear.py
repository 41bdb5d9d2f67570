"""c · linear(x, W, b) = linear(x, c·W, c·b)   for a constant c: a number, or one number per output

The product with c is made once, when weights are bound, and rounded to the weight's dtype there: exact in exact
arithmetic, bit for bit where c is a power of two. Weights that something else reads too (a tied embedding) stay as they
are, for two copies would cost more than a multiplication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten


class ScaleIntoLinear(PatternRewriter):
    root_layer = (aten.mul.Tensor, aten.div.Tensor)

    def match_and_rewrite(self, layer: Layer) -> Any:
        product, factor = scaled(layer)
        linear = None if product is None else product.parent
        if linear is None or linear.op is not aten.linear.default or layer.output.dtype != linear.output.dtype:
            return None
        x, weight, bias = linear.args
        require_unshared(weight)
        if len(linear.output.users) > 1:
            raise MatchFailure("the product is read unscaled, too")
        if isinstance(factor, Tensor) and factor.shape not in ((), (1,), weight.shape[:1]):
            raise MatchFailure(f"{factor.name} is not one number per output")
        per_row = factor.unsqueeze(1) if isinstance(factor, Tensor) and factor.rank == 1 else factor
        return F.linear(x, times(layer, weight, per_row), bias if bias is None else times(layer, bias, factor))


def scaled(layer: Layer) -> tuple[Tensor | None, Any]:
    """The operand of a product or quotient that is no constant, and the factor or divisor that is one."""
    x, factor = layer.args[:2]
    if layer.op is aten.mul.Tensor and (not isinstance(x, Tensor) or x.is_constant):
        x, factor = factor, x
    if not isinstance(x, Tensor) or x.is_constant or (isinstance(factor, Tensor) and not factor.is_constant):
        return None, None
    return x, factor


def times(layer: Layer, weight: Tensor, factor: Any) -> Any:
    """A weight multiplied, or divided, as the layer does it to its operand; in the weight's own dtype."""
    return in_dtype(layer.network.call(layer.op, weight, factor), weight.dtype)


def in_dtype(x: Any, dtype: torch.dtype) -> Any:
    return x if x.dtype == dtype else x.to(dtype)


def require_unshared(weight: Tensor) -> None:
    """Declines if the weight is no constant of floating point numbers or has other readers."""
    if not weight.is_constant or not weight.dtype.is_floating_point:
        raise MatchFailure(f"{weight.name} is no weight of floating point numbers")
    if len(weight.users) > 1:
        raise MatchFailure(f"{weight.name} is read by others, too")


__all__ = ["ScaleIntoLinear", "in_dtype", "require_unshared", "scaled", "times"]
