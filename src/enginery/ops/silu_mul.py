"""The gated activation of most decoders (SwiGLU: Shazeer, 2020) over one tensor that holds gate and up."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare
from enginery.ops.precision import widened


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) · second half of the last dimension, in the precision of the argument."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up `[..., 2·N]` -> silu(first half) · second half `[..., N]`, in float32 (float64), rounded once."""
    return silu_gate(widened(gate_up)).to(gate_up.dtype)


def _shape(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


SILU_MUL = declare("silu_mul(Tensor gate_up) -> Tensor", reference=silu_mul_reference, shape=_shape)
