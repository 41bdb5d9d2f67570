"""(x · a) · b = x · (a·b)   for constants a and b, of which a is a tensor such as the weight of a norm

The factor behind a norm goes into the norm's weight: one multiplication less in every step. Rounded once more, when
weights are bound. `layer_norm(x, w, β) · b = layer_norm(x, b·w, b·β)` likewise.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter
from enginery.rewriting.rules.scale_into_linear import scaled, times

aten = torch.ops.aten


class MergeFactors(PatternRewriter):
    root_layer = (aten.mul.Tensor, aten.div.Tensor)

    def match_and_rewrite(self, layer: Layer) -> Any:
        product, factor = scaled(layer)
        inner = None if product is None else product.parent
        if inner is None or product is None or layer.output.dtype != product.dtype:
            return None
        if isinstance(factor, Tensor) and factor.rank > 1:
            return None
        if inner.op is aten.mul.Tensor:
            x, weight = scaled(inner)
            if x is None or not isinstance(weight, Tensor) or weight.rank > 1:
                return None
            _require_one_reader(product)
            return x * times(layer, weight, factor)
        if inner.op in (aten.layer_norm.default, aten.rms_norm.default) and inner.arguments["weight"] is not None:
            _require_one_reader(product)
            names = [name for name in ("weight", "bias") if inner.arguments.get(name) is not None]
            return inner.replace(**{name: times(layer, inner.arguments[name], factor) for name in names})
        return None


def _require_one_reader(product: Tensor) -> None:
    if len(product.users) > 1 or product.is_output:
        raise MatchFailure("the first product is read, too")
