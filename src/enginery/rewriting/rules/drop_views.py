"""reshape(x, shape(x)) = expand(x, shape(x)) = slice(x, all of it) = x"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class DropViews(PatternRewriter):
    pure = True
    root_layer = (
        aten.reshape.default, aten.expand.default, aten.slice.Tensor, aten.broadcast_to.default, aten.squeeze.dim,
        aten.repeat.default, aten.expand_as.default,
    )  # fmt: skip

    def match_and_rewrite(self, layer: Layer) -> Any:
        (x, *_) = layer.inputs
        return x if layer.output.shape == x.shape else None
