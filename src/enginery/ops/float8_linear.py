"""The matrix product of 8-bit floats: a quantised linear layer without its scales."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare


def float8_linear_reference(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """input `[..., K]` · weight `[N, K]`ᵀ, both float8_e4m3fn -> `[..., N]` bfloat16, summed in float32.

    There are no scales here: they are factors of rows and columns of the result, for the calls around this one to fuse.
    Products of values up to 448 leave the range of float16 and stay far within that of bfloat16, whose rounding is
    small beside that of the operands.
    """
    return torch.nn.functional.linear(input.to(torch.float32), weight.to(torch.float32)).to(torch.bfloat16)


def _shape(input, weight):
    return input.new_empty(*input.shape[:-1], weight.shape[0], dtype=torch.bfloat16)


FLOAT8_LINEAR = declare(
    "float8_linear(Tensor input, Tensor weight) -> Tensor", reference=float8_linear_reference, shape=_shape
)
