"""The precision in which references compute."""

from __future__ import annotations

import torch


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
