"""The greatest of each row: what greedy sampling takes, and what every other way begins with."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare
from enginery.ops.precision import widened


def greatest_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits `[M, V]` -> the greatest of each row `[M]`, float32 (float64 for float64), NaN if there is one, and its
    column `[M]`, int64; of equal ones, and of NaNs, the first."""
    values, columns = logits.max(dim=1)
    return widened(values), columns


def _shape(logits):
    rows, dtype = logits.shape[0], torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=torch.int64)


GREATEST = declare("greatest(Tensor logits) -> (Tensor, Tensor)", reference=greatest_reference, shape=_shape)
