"""Products of 8-bit floats (e4m3) on NVIDIA GPUs, from compute capability 8.9 on, and the rounding of their inputs.

A row of inputs is rounded by a scale of its own, its largest magnitude over 448. Products of many rows are cuBLAS's. It
can apply the scales of rows and columns itself; where that costs more than a pass over the result (`by_rows`), it
multiplies without scales, and a kernel of ours applies them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enginery.kernels.triton.dependent_launch import launch_options, wait
from enginery.kernels.triton.gpu import Gpu
from enginery.ops import precision

LARGEST = tl.constexpr(precision.LARGEST)
SMALLEST_MAXIMUM = tl.constexpr(precision.SMALLEST_MAXIMUM)
BLOCK = 1024
"""columns of a program that applies scales"""
TILE = 128
"""rows and columns that a program of cuBLAS with scales has"""


@triton.jit
def rounded(values):
    """(values / scale in the range of float8, scale) of a row `[columns]` in float32."""
    scale = tl.maximum(tl.max(tl.abs(values), 0), SMALLEST_MAXIMUM) / LARGEST
    return tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST), scale


@triton.jit
def quantise(x, output, scales, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    values, scale = rounded(tl.load(x + row * stride + columns, inside, other=0.0).to(tl.float32))
    tl.store(output + row * WIDTH + columns, values.to(output.dtype.element_ty), inside)
    tl.store(scales + row, scale)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[M, K]` -> (x / scale `[M, K]` float8, scale of each row `[M]` float32)."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    output, scales = x.new_empty(rows, width, dtype=precision.FLOAT8), x.new_empty(rows, dtype=torch.float32)
    padded = triton.next_power_of_2(width)
    quantise[(rows,)](
        x, output, scales, x.stride(0), WIDTH=width, PADDED=padded, num_warps=warps(padded),
        **launch_options(x.device),
    )  # fmt: skip
    return output, scales


def warps(padded: int) -> int:
    """Of a program that has a row in its registers. The norm of 256 rows of 4096 takes 2.2 µs on an H200 with eight
    numbers a thread, and 2.9 with sixteen."""
    return min(max(padded // 256, 1), 16)


def number_of(scale: torch.Tensor | None) -> int:
    """No scale, one or many (2) as kernels are told: were they told how many, each number would be compiled again."""
    return 0 if scale is None else min(scale.numel(), 2)


@triton.jit
def apply_scales(
    product, row_scale, scale, bias, output, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(product + row * WIDTH + columns, inside, other=0.0).to(tl.float32) * tl.load(row_scale + row)
    values *= tl.load(scale + columns * (SCALES > 1), inside, other=0.0)
    if HAS_BIAS:
        values += tl.load(bias + columns, inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + columns, values.to(output.dtype.element_ty), inside)


def scaled(
    product: torch.Tensor, row_scale: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """product `[M, N]`, in its place · row_scale `[M]` · scale `[N]` or `[1]` + bias `[N]`."""
    rows, width = product.shape
    apply_scales[(rows, triton.cdiv(width, BLOCK))](
        product, row_scale, scale.contiguous(), product if bias is None else bias.contiguous(), product,
        SCALES=number_of(scale), HAS_BIAS=bias is not None, WIDTH=width, BLOCK=BLOCK,
        **launch_options(product.device),
    )  # fmt: skip
    return product


def by_rows(rows: int, features: int, processors: int) -> bool:
    """Whether cuBLAS is to apply the scales.

    Its kernels for that cut the result into tiles of 128 × 128 and take turns of as many as there are multiprocessors.
    Where the last turn leaves too many of these idle, a product without scales, cut more finely, and a pass over its
    result take less: of 4096 × 14336, with scales and without, 38 and 26 µs for 256 rows, 43 and 43 for 512, 73 and 51
    for 640, 80 and 80 for 896 (an H200).
    """
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(features, TILE)
    return tiles > 0.75 * processors * triton.cdiv(tiles, processors)


def unscaled_product(input: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """input `[M, K]` · weight `[N, K]`ᵀ of float8 -> `[M, N]` in bfloat16; `unit` and sums: see `float8_product`."""
    return torch._scaled_mm(input, weight.t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)


def float8_product(
    input: torch.Tensor,
    input_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    unit: torch.Tensor,
) -> torch.Tensor:
    """(input `[M, K]` · its scale `[M]`) · (weight `[N, K]` · its scale `[N]` or `[1]`)ᵀ + bias -> `[M, N]` of `dtype`.

    `unit` is the number 1 in float32: cuBLAS wants scales on the device. Sums within a tile are kept in the matrix
    unit's own precision ("fast accumulation"): less than float32, much more than the operands.
    """
    rows, features = input.shape[0], weight.shape[0]
    if by_rows(rows, features, Gpu.of(input.device).processors) or dtype != torch.bfloat16:
        columns = scale.expand(features).contiguous().view(1, features)
        result = torch._scaled_mm(
            input, weight.t(), input_scale.view(rows, 1), columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        result = result if bias is None else result.add_(bias)
        return result.to(dtype)
    return scaled(unscaled_product(input, weight, unit), input_scale, scale, bias)
