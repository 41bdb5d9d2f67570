"""Linear layers of few rows on NVIDIA GPUs: one pass over the weight at the memory's rate, for decoding.

Two kernels. *Rows* keeps products in registers and suits one row; *tiles* gives blocks of weights to the tensor cores
as the left operand, with the input padded to 16, 32 or 64 columns. A result depends on its own row and on the tiles,
never on the other rows. Both operands may be float8 (e4m3), with scales.

What stands around a product costs a twentieth of a step where it has launches of its own. So both kernels can multiply
the two halves of their features as a gated activation does: a program then has one feature of each half. And *rows* can
take in an addition and a norm before the product: every program reads whole rows anyway, the sum of squares falls off
on the way, and 1/√mean is a factor of the result.

Measured to lose, on an H200: asking the L2 cache for the next weight while small kernels run between (129 instead of
124 µs for a layer), or for 4 KiB of each row instead of one while a product waits for its turn (133 instead of 120 µs);
a norm inside *tiles*, whose inputs then no longer go from memory to the tensor cores by themselves (29 instead of 19 µs
for 6144 features and 32 rows); and splitting the depth of weights with few features, the last program adding up (12.2
instead of 11.8 µs for 4096 × 4096 and 2 rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from enginery.kernels.triton.dependent_launch import launch_options, wait_with_weights
from enginery.kernels.triton.float8 import number_of
from enginery.kernels.triton.gpu import H200_SHARED_MEMORY, Gpu


@triton.jit
def load_depths(pointer, starts, depth, inside, SOME: tl.constexpr, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[rows, BLOCK_K]`: what lies at `depth` in the rows at `starts`; with SOME, rows not `inside` are zero."""
    pointers = pointer + starts[:, None] + depth[None, :]
    if DEPTH % BLOCK_K != 0:
        if SOME:
            return tl.load(pointers, inside[:, None] & (depth < DEPTH)[None, :], other=0.0)
        return tl.load(pointers, (depth < DEPTH)[None, :], other=0.0)
    if SOME:
        return tl.load(pointers, inside[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def sources(features, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of the weight that this program has, a gated output's two side by side. Past the end the last output's
    are repeated; they are not stored."""
    place = tl.arange(0, BLOCK_N)
    if GATED:
        return tl.minimum(tl.program_id(0) * (BLOCK_N // 2) + place // 2, features - 1) + place % 2 * features
    return tl.minimum(tl.program_id(0) * BLOCK_N + place, features - 1)


@triton.jit
def finish(
    output, sums, scale, input_scale, bias, rows, features, source,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr,
    SCALES: tl.constexpr, INPUT_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Stores the output of sums `[ROWS, BLOCK_N]` in float32: times the scales, plus the bias, gated."""
    row = tl.arange(0, ROWS)
    if SCALES == 1:
        sums = sums * tl.load(scale)
    elif SCALES > 1:
        sums = sums * tl.load(scale + source)[None, :]
    if INPUT_SCALES:
        sums = sums * tl.load(input_scale + row, row < rows, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias + source).to(tl.float32)[None, :]
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if GATED:
        gates, ups = tl.split(tl.reshape(sums, [ROWS, WIDTH, 2]))
        sums = gates * tl.sigmoid(gates) * ups
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    place = row[:, None].to(tl.int64) * features + columns[None, :]
    inside = (row < rows)[:, None] & (columns < features)[None, :]
    tl.store(output + place, sums.to(output.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def linear_rows(
    input, residual, norm_weight, weight, scale, input_scale, bias, output, total, rows, features, input_stride,
    residual_stride, eps,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, SCALES: tl.constexpr, INPUT_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N features: products in float32 registers, summed over the depth at the end.

    With NORM, inputs are the sums of `input` and `residual`, which the first program stores to `total`, times
    `norm_weight`, and the result is divided by the root mean square of the sums.
    """
    source = sources(features, GATED, BLOCK_N)
    wait_with_weights(weight, source, DEPTH, AHEAD, OVERLAP)
    row = tl.arange(0, ROWS)
    inside = row < rows
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        weights = load_depths(weight, source.to(tl.int64) * DEPTH, depth, inside, False, DEPTH, BLOCK_K)
        inputs = load_depths(input, row * input_stride, depth, inside, True, DEPTH, BLOCK_K)
        if NORM:
            others = load_depths(residual, row * residual_stride, depth, inside, True, DEPTH, BLOCK_K)
            added = (inputs.to(tl.float32) + others.to(tl.float32)).to(inputs.dtype)
            is_mine = inside & (tl.program_id(0) == 0)
            tl.store(total + row[:, None] * DEPTH + depth[None, :], added, is_mine[:, None] & (depth < DEPTH)[None, :])
            inputs = added.to(tl.float32)
            squares += inputs * inputs
            inputs *= tl.load(norm_weight + depth, depth < DEPTH, other=0.0).to(tl.float32)[None, :]
        sums += weights.to(tl.float32)[None, :, :] * inputs.to(tl.float32)[:, None, :]
    result = tl.sum(sums, 2)
    if NORM:
        result *= tl.rsqrt(tl.sum(squares, 1) / DEPTH + eps)[:, None]
    finish(
        output, result, scale, input_scale, bias, rows, features, source,
        ROWS, BLOCK_N, GATED, SCALES, INPUT_SCALES, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def linear_tiles(
    input, weight, scale, input_scale, bias, output, rows, features, input_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, SCALES: tl.constexpr, INPUT_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N features: (weights · inputsᵀ)ᵀ, the weights on the long side of the tile."""
    source = sources(features, GATED, BLOCK_N)
    wait_with_weights(weight, source, DEPTH, AHEAD, OVERLAP)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        depth = first + tl.arange(0, BLOCK_K)
        weights = load_depths(weight, source.to(tl.int64) * DEPTH, depth, row < rows, False, DEPTH, BLOCK_K)
        inputs = load_depths(input, row * input_stride, depth, row < rows, True, DEPTH, BLOCK_K)
        sums = tl.dot(weights.to(inputs.dtype), tl.trans(inputs), sums, input_precision=PRECISION)
    finish(
        output, tl.trans(sums), scale, input_scale, bias, rows, features, source,
        ROWS, BLOCK_N, GATED, SCALES, INPUT_SCALES, HAS_BIAS,
    )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """How `kernel` ("rows" or "tiles") cuts a weight `[features, depth]`."""

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


FEW_FEATURES = 4096
"""For so few, one row keeps its products in registers; its programs of 8 features are more than those of 64."""


def choose_tiles(rows: int, features: int, itemsize: int = 2, shared_memory: int = H200_SHARED_MEMORY) -> Tiles:
    """The fastest tiles found on an H200 (`benchmarks/gpu_linears.py --tune`); `itemsize`: bytes of a number.

    A program of 64 features streams its weights through stages of 16 KiB, and its rows through stages of 4 KiB for
    every 16. The fewer programs there are for a multiprocessor, the more stages each needs to keep the memory busy.
    """
    if rows == 1 and features <= FEW_FEATURES:
        return Tiles("rows", 8, 1024 // itemsize, 4, 3)
    stages = 8 if features <= 4096 else 6 if features <= 8192 else 4
    fitting = {width: shared_memory // ((width + padded(rows)) * 256) for width in (64, 128)}
    if rows > 16 and features > 8192 and itemsize > 1 and fitting[128] >= stages:
        return Tiles("tiles", 128, 256 // itemsize, 8, stages)
    return Tiles("tiles", 64, 256 // itemsize, 4, max(2, min(stages, fitting[64])))


NORM_TILES = Tiles("rows", 16, 256, 4, 4)
"""For a norm before the product, on one row."""


AHEAD = 1024
"""Bytes of each row of a weight that come to the L2 cache before the product begins: with twice as many, programs that
begin later ask for what they would read anyway."""


def bytes_ahead(weight: torch.Tensor) -> int:
    """A power of two."""
    return min(AHEAD, 1 << (weight.shape[1] * weight.element_size()).bit_length() - 1)


def padded(rows: int) -> int:
    """Columns of a tile: powers of two, from the least that the tensor cores take."""
    return max(16, triton.next_power_of_2(rows))


def skinny_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    input_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    gated: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """input `[M, K]`, M ≤ 64; weight `[N, K]` -> input · (weight · scale)ᵀ + bias `[N]`, `[M, N]`, summed in float32.

    The weight is contiguous; both have one dtype. Those of float8_e4m3fn have float32 scales: the weight's `[1]` or
    `[N]`, `input_scale` `[M]`; the result then has `dtype`, and tensor cores may keep less than float32 of the sums
    (an H100: 14 bits). In *rows*, the input of a float8 weight may be wider; it has no scale then. `gated`: silu(first
    half) · second half of the features, `[M, N / 2]`.
    """
    rows, depth = input.shape
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    input = input if input.stride(1) == 1 else input.contiguous()
    output = input.new_empty(rows, features, dtype=dtype or input.dtype)
    tiles = tiles or choose_tiles(rows, weight.shape[0], weight.element_size(), Gpu.of(input.device).shared_memory)
    common: dict[str, int] = {
        "DEPTH": depth,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "STAGES": tiles.num_stages,
        "GATED": gated,
        "SCALES": number_of(scale),
        "INPUT_SCALES": input_scale is not None,
        "HAS_BIAS": bias is not None,
        "AHEAD": bytes_ahead(weight),
        "num_warps": tiles.num_warps,
        **launch_options(input.device),
    }
    grid = (triton.cdiv(weight.shape[0], tiles.block_n),)
    # A kernel needs a pointer where there is no scale or bias, too; it is never followed.
    scale, input_scale, bias = (input if each is None else each.contiguous() for each in (scale, input_scale, bias))
    if tiles.kernel == "rows":
        linear_rows[grid](
            input, input, input, weight, scale, input_scale, bias, output, output, rows, features, input.stride(0),
            0, 0.0, ROWS=triton.next_power_of_2(rows), NORM=False, **common,
        )  # fmt: skip
    else:
        linear_tiles[grid](
            input, weight, scale, input_scale, bias, output, rows, features, input.stride(0), ROWS=padded(rows),
            PRECISION="ieee" if input.dtype == torch.float32 else "tf32", **common,
        )  # fmt: skip
    return output


def skinny_norm_linear(
    input: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    tiles: Tiles = NORM_TILES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = input + residual, both `[M, K]`; (`skinny_linear` of norm_weight · total / √(mean(total²) + eps), total).

    For one row, or very few: each program adds and squares for itself.
    """
    rows, depth = input.shape
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    input, residual = (each if each.stride(1) == 1 else each.contiguous() for each in (input, residual))
    output, total = input.new_empty(rows, features), input.new_empty(rows, depth)
    linear_rows[(triton.cdiv(weight.shape[0], tiles.block_n),)](
        input, residual, norm_weight.contiguous(), weight, input, input,
        input if bias is None else bias.contiguous(), output, total, rows, features, input.stride(0),
        residual.stride(0), eps,
        DEPTH=depth, ROWS=triton.next_power_of_2(rows), BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        STAGES=tiles.num_stages, NORM=True, GATED=gated, SCALES=0, INPUT_SCALES=False, HAS_BIAS=bias is not None,
        AHEAD=bytes_ahead(weight), num_warps=tiles.num_warps,
        **launch_options(input.device),
    )  # fmt: skip
    return output, total
