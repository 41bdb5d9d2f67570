"""The precision in which references compute, and what rounds numbers to 8-bit floats: weights when they are bound,
inputs in kernels, each by a scale max|x| / LARGEST."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_MAXIMUM = 1e-12
"""stands for the maximum of a row of zeros"""
MULTIPLE = 16
"""of both sides of a weight of 8 bits: what the matrix units take"""


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
