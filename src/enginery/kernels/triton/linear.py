"""Linear layers of few rows on NVIDIA GPUs: one pass over the weight at the memory's rate, for decoding.

Two kernels. *Rows* keeps products in registers and suits one to four rows; *tiles* gives blocks of weights to the
tensor cores as the left operand, with the input padded to 16, 32 or 64 columns. A result depends on its own row and on
the tiles, never on the other rows. Weights may be float8 (e4m3) with a scale per output feature or per tensor.

Two ways to have weights on their way before their turn were measured on an H200 and lose: overlapping the launches
(programmatic dependent launch: 160 instead of 155 µs for a layer's four products on an H100), and asking the L2 cache
for the next weight while small kernels run between (129 instead of 124 µs for a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

H200_SHARED_MEMORY = 227 << 10
"""Bytes that a program may have there."""
MOST_ROWS = 32
"""Above this, cuBLAS is taken: more rows are not bound by the bytes of the weight alone."""


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
def load_depths(
    pointer, starts, depth, inside, SOME: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`[rows, BLOCK_K]`: what lies at `depth` in the rows at `starts`; with SOME, rows not `inside` are zero."""
    pointers = pointer + starts[:, None] + depth[None, :]
    if DEPTH % BLOCK_K != 0:
        if SOME:
            return tl.load(pointers, inside[:, None] & (depth < DEPTH)[None, :], other=0.0)
        return tl.load(pointers, (depth < DEPTH)[None, :], other=0.0)
    if SOME:
        return tl.load(pointers, inside[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit(do_not_specialize=["rows"])
def linear_rows(
    input, weight, scale, bias, output, rows, features, input_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N output features: products in float32 registers, summed over the depth at the end."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Features past the end repeat the last one; they are not stored.
    source = tl.minimum(columns, features - 1).to(tl.int64) * DEPTH
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        weights = load_depths(weight, source, depth, row < rows, False, DEPTH, BLOCK_K)
        inputs = load_depths(input, row * input_stride, depth, row < rows, True, DEPTH, BLOCK_K)
        sums += weights.to(tl.float32)[None, :, :] * inputs.to(tl.float32)[:, None, :]
    result = finish(output, tl.sum(sums, 2), scale, bias, features, columns, SCALES, HAS_BIAS)
    place = row[:, None].to(tl.int64) * features + columns[None, :]
    tl.store(output + place, result, (row < rows)[:, None] & (columns < features)[None, :])


@triton.jit(do_not_specialize=["rows"])
def linear_tiles(
    input, weight, scale, bias, output, rows, features, input_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N output features: (weights · inputsᵀ)ᵀ, the weights on the long side of the tile."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.minimum(columns, features - 1).to(tl.int64) * DEPTH
    row = tl.arange(0, ROWS)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        weights = load_depths(weight, source, depth, row < rows, False, DEPTH, BLOCK_K)
        inputs = load_depths(input, row * input_stride, depth, row < rows, True, DEPTH, BLOCK_K)
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


def shared_memory_of(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return H200_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def choose_tiles(rows: int, features: int, itemsize: int = 2, shared_memory: int = H200_SHARED_MEMORY) -> Tiles:
    """The fastest tiles found on an H200, for up to 16 rows (`benchmarks/gpu_kernels.py --tune`).

    A program of 64 features streams its weights through stages of 16 KiB, and its rows through stages of 4 KiB for
    every 16. The fewer programs there are for a multiprocessor, the more stages each needs to keep the memory busy.
    float8 weights (`itemsize`: bytes of a number) are bound by their conversion.
    """
    if itemsize == 1:
        return Tiles("rows", 8, 512, 4, 4) if rows == 1 else Tiles("tiles", 64, 128, 4, 8)
    if rows == 1 and features <= 4096:
        return Tiles("rows", 8, 1024 // itemsize, 4, 3)
    stages = 8 if features <= 4096 else 6 if features <= 8192 else 4
    fitting = shared_memory // ((64 + padded(rows)) * 256)
    return Tiles("tiles", 64, 256 // itemsize, 4, max(2, min(stages, fitting)))


def padded(rows: int) -> int:
    """Columns of a tile: powers of two, from the least that the tensor cores take."""
    return max(16, triton.next_power_of_2(rows))


def skinny_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """input `[M, K]`, M ≤ 64; weight `[N, K]` -> input · (weight · scale)ᵀ + bias `[N]`, `[M, N]`, summed in float32.

    The weight is contiguous and of the input's dtype, or float8_e4m3fn with a float32 scale `[1]` or `[N]`.
    """
    rows, depth = input.shape
    features = weight.shape[0]
    input = input if input.stride(1) == 1 else input.contiguous()
    output = input.new_empty(rows, features)
    tiles = tiles or choose_tiles(rows, features, weight.element_size(), shared_memory_of(input.device))
    grid = (triton.cdiv(features, tiles.block_n),)
    common = {
        "DEPTH": depth,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "STAGES": tiles.num_stages,
        "SCALES": 0 if scale is None else scale.numel(),
        "HAS_BIAS": bias is not None,
        "num_warps": tiles.num_warps,
    }
    # A kernel needs a pointer where there is no scale or bias, too; it is never followed.
    pointers = (input, weight, input if scale is None else scale, input if bias is None else bias, output)
    sizes = (rows, features, input.stride(0))
    if tiles.kernel == "rows":
        power = triton.next_power_of_2(rows)
        linear_rows[grid](*pointers, *sizes, ROWS=power, **common)
    else:
        precision = "ieee" if input.dtype == torch.float32 else "tf32"
        columns = padded(rows)
        linear_tiles[grid](*pointers, *sizes, ROWS=columns, PRECISION=precision, **common)
    return output


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The contract of `enginery::linear`. Few rows of 16 bits go to the kernels of this file, others to cuBLAS."""
    rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
    skinny = 0 < rows <= MOST_ROWS and input.element_size() == 2 and input.dtype == weight.dtype
    if not skinny or not weight.is_contiguous():
        return torch.nn.functional.linear(input, weight, bias)
    return skinny_linear(input.reshape(rows, -1), weight, bias).view(*input.shape[:-1], -1)
