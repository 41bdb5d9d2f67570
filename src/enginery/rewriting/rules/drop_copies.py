"""contiguous(x) = clone(x) = dropout(x, train=False) = x

Values of a network are never written in place (but for caches), so a copy is the value itself.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class DropCopies(PatternRewriter):
    pure = True
    root_layer = (
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.dropout.default, aten.feature_dropout.default,
    )  # fmt: skip

    def match_and_rewrite(self, layer: Layer) -> Any:
        if layer.arguments.get("train"):
            return None
        return layer.inputs[0]
