"""silu(g) · u = silu_mul(gu)   where g and u are the halves of gu, the output of the merged gate and up projection"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery import ops
from enginery.network import Tensor
from enginery.rewriting.pattern import OneOf, Scalar, Var
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten


class FuseSiluMul(PatternRewriter):
    parts = aten.split_with_sizes.default(Var("gate_up"), Scalar("sizes"), Scalar("dim"))
    halves = aten.chunk.default(Var("gate_up"), 2, Scalar("dim"))
    pattern = OneOf(F.silu(parts[0]) * parts[1], F.silu(halves[0]) * halves[1])

    def rewrite(self, gate_up: Tensor, dim: int, sizes: tuple[int, ...] | None) -> Any:
        width = gate_up.shape[-1]
        if dim % gate_up.rank != gate_up.rank - 1 or (sizes is not None and sizes != (sizes[0],) * 2) or width % 2:
            raise MatchFailure("gate and up are not the halves of one tensor")
        return ops.silu_mul(gate_up)
