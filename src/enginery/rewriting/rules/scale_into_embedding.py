"""c · embedding(W, i) = embedding(c·W, i)   for a constant c: a number, or one number per feature

Rounded to the weight's dtype once, when weights are bound. An embedding that the head shares stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter
from enginery.rewriting.rules.scale_into_linear import require_unshared, scaled, times

aten = torch.ops.aten


class ScaleIntoEmbedding(PatternRewriter):
    root_layer = (aten.mul.Tensor, aten.div.Tensor)

    def match_and_rewrite(self, layer: Layer) -> Any:
        rows, factor = scaled(layer)
        lookup = None if rows is None else rows.parent
        if lookup is None or lookup.op is not aten.embedding.default or layer.output.dtype != lookup.output.dtype:
            return None
        weight, indices = lookup.args[:2]
        require_unshared(weight)
        if len(lookup.output.users) > 1:
            raise MatchFailure("the rows are read unscaled, too")
        if isinstance(factor, Tensor) and factor.shape not in ((), (1,), weight.shape[1:]):
            raise MatchFailure(f"{factor.name} is not one number per feature")
        return torch.embedding(times(layer, weight, factor), indices)
