"""linear(x, W, b) = enginery::linear(x, W, b)

The GPU's own linear: kernels for the few rows of decoding, and what `FuseNormLinear` joins with the norm before it.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer
from enginery.rewriting.rule import MatchFailure, PatternRewriter

DTYPES = (torch.bfloat16, torch.float16)


class SkinnyLinears(PatternRewriter):
    root_layer = (torch.ops.aten.linear.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, weight, bias = layer.args
        if not weight.is_constant or weight.rank != 2 or x.is_constant or (bias is not None and not bias.is_constant):
            raise MatchFailure("its weight is no constant matrix")
        if weight.dtype not in DTYPES or x.dtype != weight.dtype:
            raise MatchFailure(f"its operands are {x.dtype} and {weight.dtype}")
        return ops.linear(x, weight, bias)
