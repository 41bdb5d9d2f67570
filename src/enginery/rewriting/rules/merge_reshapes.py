"""reshape(reshape(x, s), t) = reshape(x, t), where the inner one may be an unsqueeze or a squeeze"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten

REGROUPING = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default)


class MergeReshapes(PatternRewriter):
    pure = True
    root_layer = (aten.reshape.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        inner = layer.inputs[0].parent
        if inner is None or inner.op not in REGROUPING:
            return None
        return inner.inputs[0].reshape(layer.output.shape)
