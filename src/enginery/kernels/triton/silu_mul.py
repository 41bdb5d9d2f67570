"""`enginery::silu_mul` on NVIDIA GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enginery.kernels.triton.dependent_launch import launch_options, wait

BLOCK = 1024
"""outputs of one program"""


@triton.jit
def gate(gate_up, output, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = gate_up + row * row_stride + columns
    gates = tl.load(source, inside, other=0.0).to(tl.float32)
    ups = tl.load(source + WIDTH, inside, other=0.0).to(tl.float32)
    result = gates * tl.sigmoid(gates) * ups
    tl.store(output + row * WIDTH + columns, result.to(output.dtype.element_ty), inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The contract of `enginery::silu_mul`, in 16 and 32 bits."""
    width = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    output = gate_up.new_empty(*gate_up.shape[:-1], width)
    if output.numel() > 0:
        gate[(rows.shape[0], triton.cdiv(width, BLOCK))](
            rows, output, rows.stride(0), WIDTH=width, BLOCK=BLOCK, **launch_options(rows.device)
        )
    return output
