"""linear(norm(x)·w + β, W, b) = linear(norm(x), W·w, b + W·β)   for a layer norm or RMS norm in one call

The affine part of a norm goes into the linears behind it, if nothing else reads the norm and the linears' weights are
their own. Rounded to the weight's dtype once, when weights are bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter
from enginery.rewriting.rules.scale_before_linear import linear_readers
from enginery.rewriting.rules.scale_into_linear import in_dtype, require_unshared

aten = torch.ops.aten


class NormIntoLinear(PatternRewriter):
    root_layer = (aten.layer_norm.default, aten.rms_norm.default)

    def match_and_rewrite(self, layer: Layer) -> Any:
        arguments = layer.arguments
        scale, offset = arguments["weight"], arguments.get("bias")
        if scale is None and offset is None:
            return None
        linears = linear_readers(layer.output)
        if not linears:
            raise MatchFailure("something else than linears reads the norm")
        if len(arguments["normalized_shape"]) != 1 or not all(t is None or t.is_constant for t in (scale, offset)):
            raise MatchFailure("its weights are not one constant number per feature")
        for linear in linears:
            require_unshared(linear.args[1])
        plain: Any = layer.replace(**{name: None for name in ("weight", "bias") if name in arguments})
        x = in_dtype(plain, linears[0].args[0].dtype)
        return {linear: _linear(x, scale, offset, *linear.args[1:]) for linear in linears}


def _linear(x: Any, scale: Tensor | None, offset: Tensor | None, weight: Any, bias: Any) -> Any:
    """linear(x·scale + offset, weight, bias) with all constants on the side of the weight."""
    if offset is not None:
        moved = F.linear(in_dtype(offset, weight.dtype), weight)
        bias = moved if bias is None else bias + moved
    if scale is not None:
        weight = in_dtype(weight * scale, weight.dtype)
    return F.linear(x, weight, bias)
