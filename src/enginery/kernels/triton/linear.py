"""Linear layers of 1 to 16 rows on NVIDIA GPUs: one pass over the weight at the memory's rate (decoding reads every weight once).

Two kernels. *Rows* keeps products in registers and suits one to four rows; *tiles* gives each block of weights to the tensor
cores as the left operand, with the input padded to 16 columns. A result depends on its own row and the kernel's tiles only,
never on the other rows. Weights may be float8 (e4m3) with a scale per output feature or per tensor; the input keeps its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 16
"""Above this, matrix products are no longer bound by the weight's bytes alone and cuBLAS takes over."""


@triton.jit
def finish(output, sums, scale, bias, features, columns, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Output of sums `[rows, columns]` in float32: times the weight's scale, plus the bias."""
    inside = columns < features
    if SCALES == 1:
        sums = sums * tl.load(scale)
    elif SCALES > 1:
        sums = sums * tl.load(scale + columns, inside, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + columns, inside, other=0.0).to(tl.float32)[None, :]
    return sums.to(output.dtype.element_ty)


@triton.jit
def await_input(weights, features_first, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr):
    """Waits for the kernel before this one, whose output may be the input; meanwhile AHEAD columns of weights go to the L2."""
    if AHEAD > 0:
        lines = tl.arange(0, AHEAD // 64) * 64
        pointers = weights + features_first[:, None] + lines[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
    gdc_wait()
    gdc_launch_dependents()


@triton.jit(do_not_specialize=["rows"])
def linear_rows(
    input, weight, scale, bias, output, rows, features, input_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N output features: products in float32 registers, summed over the depth once, at the end."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Features past the end repeat the last one; they are not stored.
    source = tl.minimum(columns, features - 1).to(tl.int64) * DEPTH
    row = tl.arange(0, ROWS)
    if OVERLAP:
        await_input(weight, source, DEPTH, BLOCK_N, AHEAD)
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        if DEPTH % BLOCK_K == 0:
            weights = tl.load(weight + source[:, None] + depth[None, :])
            inputs = tl.load(input + row[:, None] * input_stride + depth[None, :], (row < rows)[:, None], other=0.0)
        else:
            inside = depth < DEPTH
            weights = tl.load(weight + source[:, None] + depth[None, :], inside[None, :], other=0.0)
            inputs = tl.load(
                input + row[:, None] * input_stride + depth[None, :], (row < rows)[:, None] & inside[None, :], other=0.0
            )
        sums += weights.to(tl.float32)[None, :, :] * inputs.to(tl.float32)[:, None, :]
    result = finish(output, tl.sum(sums, 2), scale, bias, features, columns, SCALES, HAS_BIAS)
    place = row[:, None].to(tl.int64) * features + columns[None, :]
    tl.store(output + place, result, (row < rows)[:, None] & (columns < features)[None, :])


@triton.jit(do_not_specialize=["rows"])
def linear_tiles(
    input, weight, scale, bias, output, rows, features, input_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N output features: (weights · inputsᵀ)ᵀ, so that the long side of the tile is the weight's."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.minimum(columns, features - 1).to(tl.int64) * DEPTH
    row = tl.arange(0, ROWS)
    if OVERLAP:
        await_input(weight, source, DEPTH, BLOCK_N, AHEAD)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        if DEPTH % BLOCK_K == 0:
            weights = tl.load(weight + source[:, None] + depth[None, :])
            inputs = tl.load(input + row[:, None] * input_stride + depth[None, :], (row < rows)[:, None], other=0.0)
        else:
            inside = depth < DEPTH
            weights = tl.load(weight + source[:, None] + depth[None, :], inside[None, :], other=0.0)
            inputs = tl.load(
                input + row[:, None] * input_stride + depth[None, :], (row < rows)[:, None] & inside[None, :], other=0.0
            )
        sums = tl.dot(weights.to(inputs.dtype), tl.trans(inputs), sums, input_precision=PRECISION)
    result = finish(output, tl.trans(sums), scale, bias, features, columns, SCALES, HAS_BIAS)
    place = row[:, None].to(tl.int64) * features + columns[None, :]
    tl.store(output + place, result, (row < rows)[:, None] & (columns < features)[None, :])


@dataclass(frozen=True)
class Tiles:
    """How `kernel` ("rows" or "tiles") cuts a weight `[features, depth]`."""

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    overlap: bool = False
    """Start while the kernel before still runs (programmatic dependent launch, from compute capability 9.0)."""
    ahead: int = 0
    """Columns of its weights that a program fetches into the L2 while it waits."""


FALLBACK = Tiles("tiles", 64, 128, 4, 6)


def choose_tiles(rows: int, features: int, depth: int, itemsize: int) -> Tiles:
    """Measured choices by shape class; `benchmarks/gpu_kernels.py --tune` prints them again."""
    if rows == 1 and features <= 4096:
        return Tiles("rows", 8, 512, 4, 3)
    if features > 65536:
        return Tiles("tiles", 32, 128, 2, 6)
    if features > 16384:
        return Tiles("tiles", 64, 128, 4, 4)
    if depth > 8192:
        return Tiles("tiles", 32, 256, 4, 5)
    return FALLBACK


def skinny_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """input `[M, K]`, M ≤ 16; weight `[N, K]` contiguous, of the input's dtype or float8_e4m3fn with scale `[1]` or `[N]` float32.

    Returns `[M, N]`: input · (weight · scale)ᵀ + bias, summed in float32.
    """
    rows, depth = input.shape
    features = weight.shape[0]
    input = input if input.stride(1) == 1 else input.contiguous()
    output = input.new_empty(rows, features)
    tiles = tiles or choose_tiles(rows, features, depth, weight.element_size())
    common = {
        "DEPTH": depth,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "STAGES": tiles.num_stages,
        "SCALES": 0 if scale is None else scale.numel(),
        "HAS_BIAS": bias is not None,
        "OVERLAP": tiles.overlap,
        "AHEAD": tiles.ahead,
        "launch_pdl": tiles.overlap,
        "num_warps": tiles.num_warps,
    }
    # A kernel needs a pointer where there is no scale or bias, too; it is never followed.
    arguments = (input, weight, input if scale is None else scale, input if bias is None else bias, output)
    grid = (triton.cdiv(features, tiles.block_n),)
    if tiles.kernel == "rows":
        padded = triton.next_power_of_2(rows)
        linear_rows[grid](*arguments, rows, features, input.stride(0), ROWS=padded, **common)
    else:
        precision = "ieee" if input.dtype == torch.float32 else "tf32"
        linear_tiles[grid](*arguments, rows, features, input.stride(0), ROWS=MAX_ROWS, PRECISION=precision, **common)
    return output


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` for any leading shape; few rows go to the kernels of this file, others to cuBLAS."""
    rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
    if not 0 < rows <= MAX_ROWS or not weight.is_contiguous():
        return torch.nn.functional.linear(input, weight, bias)
    return skinny_linear(input.reshape(rows, -1), weight, bias).view(*input.shape[:-1], -1)
