"""The residual addition and the RMS norm behind it (Zhang and Sennrich, NeurIPS 2019) as one operator."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare
from enginery.ops.precision import widened


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / √(mean(x²) + eps) over the last dimension, in x's precision."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual `[..., N]`, weight `[N]` -> norm(s)·weight and s = x + residual, both `[..., N]` in x's dtype.

    norm(s) = s / √(mean(s²) + eps) of the sum as it is returned, in float32 (float64 for float64), rounded once.
    """
    total = x + residual
    return rms_norm(widened(total), weight, eps).to(x.dtype), total


def _shape(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


ADD_RMS_NORM = declare(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=add_rms_norm_reference,
    shape=_shape,
)
