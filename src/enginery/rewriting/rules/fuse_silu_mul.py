"""silu(g) · u = silu_mul(gu)   where g and u are the halves of gu, the output of the merged gate and up projection"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.rewriting.pattern import Var
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten

HALVING = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


class FuseSiluMul(PatternRewriter):
    pattern = aten.silu.default(Var("gate")) * Var("up")

    def rewrite(self, gate: Any, up: Any) -> Any:
        parts = gate.parent
        if parts is None or parts is not up.parent or parts.op not in HALVING or parts.outputs != (gate, up):
            raise MatchFailure("gate and up are not the two parts of one tensor, in this order")
        joined = parts.inputs[0]
        if parts.arguments["dim"] % joined.rank != joined.rank - 1 or gate.shape != up.shape:
            raise MatchFailure("gate and up are not the halves of the features")
        return ops.silu_mul(joined)
