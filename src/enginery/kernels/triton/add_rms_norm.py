"""Addition and RMS norm on NVIDIA GPUs: one program per row, which stays in registers between sum and norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enginery.kernels.triton.dependent_launch import launch_options, wait
from enginery.kernels.triton.float8 import rounded, warps
from enginery.ops.precision import FLOAT8


@triton.jit
def add_and_normalise(
    x, residual, weight, normed, scales, total, x_stride, residual_stride, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, FLOAT8: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum is rounded to its dtype before it is squared, as it is where the two are separate. With FLOAT8 the result
    is rounded by the row's scale."""
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    one = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    other = tl.load(residual + row * residual_stride + columns, inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    added = (one + other).to(total.dtype.element_ty)
    tl.store(total + row * WIDTH + columns, added, inside)
    sums = added.to(tl.float32)
    result = sums * tl.rsqrt(tl.sum(sums * sums, 0) / WIDTH + eps) * weights
    if FLOAT8:
        result, scale = rounded(result)
        tl.store(scales + row, scale)
    tl.store(normed + row * WIDTH + columns, result.to(normed.dtype.element_ty), inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `enginery::add_rms_norm`, in 16 and 32 bits."""
    normed, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, eps, normed, None, total)
    return normed, total


def add_rms_norm_float8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the norm's result `[..., K]` float8, the scale of each row `[M]` float32, the sum)."""
    normed, total = x.new_empty(x.shape, dtype=FLOAT8), x.new_empty(x.shape)
    scales = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    _launch(x, residual, weight, eps, normed, scales, total)
    return normed, scales, total


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    normed: torch.Tensor, scales: torch.Tensor | None, total: torch.Tensor,
) -> None:  # fmt: skip
    width = x.shape[-1]
    rows, others = x.reshape(-1, width), residual.reshape(-1, width)
    rows, others = (each if each.stride(1) == 1 else each.contiguous() for each in (rows, others))
    if rows.shape[0] > 0:
        padded = triton.next_power_of_2(width)
        add_and_normalise[(rows.shape[0],)](
            rows, others, weight.contiguous(), normed, total if scales is None else scales, total, rows.stride(0),
            others.stride(0), eps,
            WIDTH=width, PADDED=padded, FLOAT8=scales is not None, num_warps=warps(padded),
            **launch_options(x.device),
        )  # fmt: skip
