"""Residual addition, RMS norm and the linear layer behind it, perhaps a gated one, as one operator."""

from __future__ import annotations

import torch

from enginery.ops.add_rms_norm import rms_norm
from enginery.ops.declare import declare
from enginery.ops.linear import wide_linear
from enginery.ops.precision import widened
from enginery.ops.silu_mul import silu_gate


def norm_linear_reference(
    input: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """input and residual `[..., K]`, norm_weight `[K]`, weight `[N, K]` -> output `[..., N]`, total `[..., K]`.

    total = input + residual, rounded to their dtype; n = norm_weight · total / √(mean(total²) + eps);
    output = `linear(n, weight, bias, scale)`. Gated, the weight holds gate and up, and with those two halves of its
    outputs the output is silu(gate) · up `[..., N/2]`. All of the output in float32 (float64), rounded once. Kernels
    may round n to the input's dtype, and as `linear` may.
    """
    total = input + residual
    output = wide_linear(rms_norm(widened(total), norm_weight, eps), weight, bias, scale)
    if gated:
        output = silu_gate(output)
    return output.to(input.dtype), total


def _shape(input, residual, norm_weight, eps, weight, bias=None, scale=None, gated=False):
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    return input.new_empty(*input.shape[:-1], features), input.new_empty(input.shape)


NORM_LINEAR = declare(
    "norm_linear(Tensor input, Tensor residual, Tensor norm_weight, float eps, Tensor weight, Tensor? bias=None, "
    "Tensor? scale=None, bool gated=False) -> (Tensor, Tensor)",
    reference=norm_linear_reference,
    shape=_shape,
)
