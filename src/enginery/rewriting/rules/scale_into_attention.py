"""attention(c·q, k, v, s) = attention(q, c·k, v, s) = attention(q, k, v, c·s)   for a number c

The operator scales its scores anyway, in float32. The multiplication is found through views and changes of layout.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.rules.scale_into_linear import scaled

aten = torch.ops.aten

VIEWS = (aten.reshape.default, aten.transpose.int, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim)


class ScaleIntoAttention(PatternRewriter):
    root_layer = (ops.attention,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        query, key, _, scale = layer.args[:4]
        for name, tensor in (("query", query), ("key", key)):
            views, product = _behind_views(tensor)
            if product is None or product.op not in (aten.mul.Tensor, aten.div.Tensor):
                continue
            x, factor = scaled(product)
            if x is None or x.dtype != tensor.dtype or not isinstance(factor, (int, float)):
                continue
            scale = scale * factor if product.op is aten.mul.Tensor else scale / factor
            return layer.replace(**{name: _viewed(x, views), "scale": scale})
        return None


def _behind_views(tensor: Tensor) -> tuple[list[Layer], Layer | None]:
    """The views that a tensor is made by, outermost first, and the layer below them."""
    views: list[Layer] = []
    layer = tensor.parent
    while layer is not None and layer.op in VIEWS:
        views.append(layer)
        layer = layer.inputs[0].parent
    return views, layer


def _viewed(x: Any, views: list[Layer]) -> Any:
    for view in reversed(views):
        x = x.network.call(view.op, x, *view.args[1:])
    return x
