"""`enginery::add_rms_norm` on NVIDIA GPUs: one program per row, which stays in registers between sum and norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def add_and_normalise(
    x, residual, weight, normed, total, x_stride, residual_stride, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The sum is rounded to the output's dtype before it is squared, as it is where the two are separate."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    one = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    other = tl.load(residual + row * residual_stride + columns, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    rounded = (one + other).to(total.dtype.element_ty)
    tl.store(total + row * WIDTH + columns, rounded, inside)
    sums = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(sums * sums, 0) / WIDTH + eps)
    tl.store(normed + row * WIDTH + columns, (sums * inverse * scale).to(normed.dtype.element_ty), inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `enginery::add_rms_norm`, in 16 and 32 bits."""
    width = x.shape[-1]
    rows, others = x.reshape(-1, width), residual.reshape(-1, width)
    rows, others = (each if each.stride(1) == 1 else each.contiguous() for each in (rows, others))
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    if rows.shape[0] > 0:
        padded = triton.next_power_of_2(width)
        add_and_normalise[(rows.shape[0],)](
            rows, others, weight.contiguous(), normed, total, rows.stride(0), others.stride(0), eps,
            WIDTH=width, PADDED=padded, num_warps=min(max(padded // 512, 1), 16),
        )  # fmt: skip
    return normed, total
