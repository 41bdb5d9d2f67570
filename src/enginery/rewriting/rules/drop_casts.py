"""to(x, dtype(x)) = x"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class DropCasts(PatternRewriter):
    pure = True
    root_layer = (
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default,
    )  # fmt: skip

    def match_and_rewrite(self, layer: Layer) -> Any:
        x = layer.inputs[0]
        if layer.output.dtype == x.dtype:
            return x
        if layer.op is aten.to.dtype:
            return None
        return x.to(layer.output.dtype)  # one spelling for the casts that remain
