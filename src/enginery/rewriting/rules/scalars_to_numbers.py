"""x · c = x · 3.5   for a tensor c of one element without dimensions, whose value is known

Buffers that hold one number (the scale of Gemma's embeddings) are known when a model is imported. As a literal the
number is seen by other rules. Larger constants need no rule: whatever follows from constants alone is computed when
weights are bound (`engine/binding.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten


class ScalarsToNumbers(PatternRewriter):
    pure = True
    root_layer = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, c = layer.args[:2]
        swapped = layer.op in (aten.mul.Tensor, aten.add.Tensor) and _number(x) is not None
        if swapped:
            x, c = c, x
        number = _number(c)
        if number is None or not isinstance(x, Tensor) or x.is_constant or x.dtype != layer.output.dtype:
            return None
        return layer.network.call(layer.op, x, number, *layer.args[2:])


def _number(value: Any) -> float | None:
    if not isinstance(value, Tensor) or value.rank != 0 or value.name not in value.network.values:
        return None
    return value.network.values[value.name].to(value.dtype).item()
