"""select(unsqueeze(x, d), d, 0) = squeeze(unsqueeze(x, d), d) = x"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class CancelUnsqueeze(PatternRewriter):
    pure = True
    root_layer = (aten.select.int, aten.squeeze.dim)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, dim = layer.args[:2]
        inner = x.parent
        if inner is None or inner.op is not aten.unsqueeze.default or inner.args[1] % x.rank != dim % x.rank:
            return None
        return inner.inputs[0]
