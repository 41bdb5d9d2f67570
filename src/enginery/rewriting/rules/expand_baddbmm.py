"""baddbmm(b, x, y) = β·b + α·(x·y)

One spelling for products with a bias; what recognises attention looks for the plain product.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class ExpandBaddbmm(PatternRewriter):
    pure = True
    root_layer = (aten.baddbmm.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        bias, x, y, beta, alpha = layer.args
        product = torch.bmm(x, y)
        return (product if alpha == 1 else product * alpha) + (bias if beta == 1 else bias * beta)
