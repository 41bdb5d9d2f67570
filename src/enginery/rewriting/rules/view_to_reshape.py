"""view(x, s) = flatten(x) = unflatten(x) = reshape(x, s)

One spelling for what only regroups elements. A reshape takes any strides, so copies made for a view can go afterwards.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class ViewToReshape(PatternRewriter):
    pure = True
    root_layer = (
        aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    )  # fmt: skip

    def match_and_rewrite(self, layer: Layer) -> Any:
        return layer.inputs[0].reshape(layer.output.shape)
