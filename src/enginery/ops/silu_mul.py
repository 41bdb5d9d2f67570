"""The gated activation of most decoders (SwiGLU: Shazeer, 2020) over one tensor that holds gate and up."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up `[..., 2·N]` -> silu(first half) · second half `[..., N]`, in float32 (float64), rounded once."""
    wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def _shape(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


SILU_MUL = declare("silu_mul(Tensor gate_up) -> Tensor", reference=silu_mul_reference, shape=_shape)
