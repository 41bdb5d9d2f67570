"""Linear layers of one row on Hopper GPUs: weights stream from memory across the ends of kernels.

At one row a step reads each weight once and computes next to nothing: it takes as long as the memory is kept busy. Most
of what is lost is lost between kernels, where the last programs of one end while those of the next read their row, then
ask for weights, then wait for them. Here weights are asked for first, into a ring in shared memory, as soon as there is
room for a program:

    copies      let the next kernel in;  weights until the ring is full, whatever the kernels ahead still do;
                each further step when its slot is empty
    multiplies  wait for the kernel ahead;  take in its row, normed if wanted;  in each step multiply and add;
                at the end of a tile the sum of all threads, scales, bias and gate

The rings of an H200 hold 26 MB, 6 µs of reading, which hide attention, a norm, or the beginning of a product. Programs
take tiles of 16 features in turns, and the ring runs on from one tile into the next. The ordinary float32 units keep up
with the memory at one row, for weights of 8 bits, too: these need no rounded row and no kernel that rounds it.

A layer of an 8B decoder with its attention, in µs on an H200; beside it `linear_tiles` and `linear_rows`:

    context            193              1,025             8,257
    bfloat16     111.0 (120.6)     113.3 (122.2)     123.5 (131.0)
    float8        68.6  (73.5)      70.8  (76.0)      82.1  (86.0)

Measured to lose (`benchmarks/results/gpu_kernels.json`): letting the next kernel in behind the last copies (1.2 more in
bfloat16, 3.8 at the longest context); the same number of tiles for each program (0.8 more); rings so small that the
next kernel's programs fit beside them (16 more); eight warps that multiply (3 more); products of two weights of 8 bits
at once, in float16: a third less to do for the float32 units, and no less time. The same stream for 8 to 64 rows,
multiplied by the matrix units, takes 4 to 17 % more for a layer than `linear_tiles`.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from enginery.kernels.triton.float8 import number_of
from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.hopper_barriers import locate, new_barriers
from enginery.ops.precision import FLOAT8

HALF: gl.constexpr = gl.constexpr(8)
"""Features in each of a tile's two halves: gates and ups, or one half behind the other."""
WIDTH: gl.constexpr = gl.constexpr(256)
"""Numbers of 16 bits that a step takes of each feature; weights of 8 bits are copied two as one."""
SWIZZLE: gl.constexpr = gl.constexpr(128)
"""Bytes of each row that a copy brings; those that bring whole rows of a step took 2 % more for a
layer in bfloat16."""
STEPS = 2
"""In a slot of the ring, if the depth is a multiple of them: each slot costs barriers of all warps."""
PROGRAMS = 2
"""For each multiprocessor."""
SHARED_MEMORY = 110 << 10
"""Bytes of a program: the row, and the ring in the rest."""
REGISTERS = 128
"""Of a thread at the start, so that the programs fit: four warps to multiply, and four of which one copies."""
COPYING: gl.constexpr = gl.constexpr(24)
"""Of a thread that copies; those that multiply get what it gives."""
DEEPEST = 16384
"""Numbers of a row: each thread that multiplies loads its share of them at once. Of so many, some do not stay in
registers where a norm is in float32."""


class Layer(NamedTuple):
    """What a launch is given."""

    weight: tma.tensor_descriptor
    input: gl.tensor
    residual: gl.tensor
    norm_weight: gl.tensor
    scale: gl.tensor
    bias: gl.tensor
    output: gl.tensor
    total: gl.tensor
    features: gl.tensor
    eps: gl.tensor
    DEPTH: gl.constexpr
    ROUNDS: gl.constexpr
    STEPS: gl.constexpr
    FLOAT8: gl.constexpr
    NORM: gl.constexpr
    GATED: gl.constexpr
    SCALES: gl.constexpr
    HAS_BIAS: gl.constexpr


class Ring(NamedTuple):
    """Slots of weights `[STAGES·STEPS·2, HALF, WIDTH]`, a round in each; barriers `[STAGES, 1]`; the row `[PADDED]`."""

    weights: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    row: gl.shared_memory_descriptor


@gluon.jit
def tiles_of(layer):
    """Of all programs."""
    return gl.cdiv(layer.features, HALF if layer.GATED else 2 * HALF)


@gluon.jit
def first_feature(layer, tile, half):
    """Of a half of a tile, as a row of the weight."""
    if layer.GATED:
        return tile * HALF + half * layer.features
    return (2 * tile + half) * HALF


@gluon.jit
def produce(layer, ring):
    """The warp that fills the ring. No kernel writes weights, so their copies wait for none."""
    gdc_launch_dependents()
    done = 0
    for tile in range(gl.program_id(0), tiles_of(layer), gl.num_programs(0)):
        for round in range(layer.ROUNDS):
            slot, parity = locate(ring, done)
            # Until the round that had the slot before has given it back; the first ones find it as if given back.
            mbarrier.wait(ring.empty.index(slot), parity ^ 1)
            barrier = ring.full.index(slot)
            mbarrier.expect(barrier, 2 * layer.STEPS * layer.weight.block_type.nbytes)
            for step in gl.static_range(layer.STEPS):
                for half in gl.static_range(2):
                    place = [first_feature(layer, tile, half), (round * layer.STEPS + step) * WIDTH]
                    target = ring.weights.index((slot * layer.STEPS + step) * 2 + half)
                    tma.async_copy_global_to_shared(layer.weight, place, barrier, target)
            done += 1


@gluon.jit
def take_row(layer, ring):
    """Brings the row to shared memory; with NORM that of the sum, which the first program stores to `total`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    place = gl.arange(0, ring.row.shape[0], LAYOUT)
    inside = place < layer.DEPTH
    gdc_wait()
    if layer.NORM:
        one = gl.load(layer.input + place, inside, other=0.0)
        other = gl.load(layer.residual + place, inside, other=0.0)
        factors = gl.load(layer.norm_weight + place, inside, other=0.0).to(gl.float32)
        added = (one.to(gl.float32) + other.to(gl.float32)).to(one.dtype)
        gl.store(layer.total + place, added, inside & (gl.program_id(0) == 0))
        sums = added.to(gl.float32)
        normed = sums * gl.rsqrt(gl.sum(sums * sums, 0) / layer.DEPTH + layer.eps) * factors
        ring.row.store(normed.to(one.dtype))
    else:
        ring.row.store(gl.load(layer.input + place, inside, other=0.0))


@gluon.jit
def load_scale_and_bias(layer, feature):
    """Of features; past the last one its own once more, for what nobody stores."""
    feature = gl.minimum(feature, layer.features * (2 if layer.GATED else 1) - 1)
    scale, bias = 1.0, 0.0
    if layer.SCALES == 1:
        scale = gl.load(layer.scale)
    elif layer.SCALES > 1:
        scale = gl.load(layer.scale + feature)
    if layer.HAS_BIAS:
        bias = gl.load(layer.bias + feature).to(gl.float32)
    return scale, bias


@gluon.jit
def store(layer, result, column):
    gl.store(layer.output + column, result.to(layer.output.dtype.element_ty), column < layer.features)


@gluon.jit
def multiply(layer, ring):
    """The warps that multiply: each thread sums over its part of the depth, in registers until the tile's end."""
    BLOCK_K: gl.constexpr = 2 * WIDTH if layer.FLOAT8 else WIDTH
    SPREAD: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    weights = ring.weights
    if layer.FLOAT8:
        BYTES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=8, rank=2)
        weights = weights._reinterpret(gl.float8e4nv, [weights.shape[0], HALF, BLOCK_K], BYTES)
    take_row(layer, ring)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = ring.row._reinterpret(ring.row.dtype, [ring.row.shape[0] // BLOCK_K, BLOCK_K], PLAIN)
    place = gl.arange(0, HALF, gl.SliceLayout(1, SPREAD))
    done = 0
    for tile in range(gl.program_id(0), tiles_of(layer), gl.num_programs(0)):
        column = first_feature(layer, tile, 0) + place
        # Asked for before the products, which hide how long they take.
        scale, bias = load_scale_and_bias(layer, column)
        other_scale, other_bias = load_scale_and_bias(layer, first_feature(layer, tile, 1) + place)
        sums = gl.zeros([HALF, BLOCK_K], gl.float32, SPREAD)
        other_sums = gl.zeros([HALF, BLOCK_K], gl.float32, SPREAD)
        for round in range(layer.ROUNDS):
            slot, parity = locate(ring, done)
            mbarrier.wait(ring.full.index(slot), parity)
            for step in gl.static_range(layer.STEPS):
                inputs = row.index(round * layer.STEPS + step).load(gl.SliceLayout(0, SPREAD)).to(gl.float32)[None, :]
                first = weights.index((slot * layer.STEPS + step) * 2).load(SPREAD)
                second = weights.index((slot * layer.STEPS + step) * 2 + 1).load(SPREAD)
                sums += first.to(gl.float32) * inputs
                other_sums += second.to(gl.float32) * inputs
            fence_async_shared()
            mbarrier.arrive(ring.empty.index(slot))
            done += 1
        result = gl.sum(sums, 1) * scale + bias
        other_result = gl.sum(other_sums, 1) * other_scale + other_bias
        if layer.GATED:
            store(layer, result / (1 + gl.exp(-result)) * other_result, column)
        else:
            store(layer, result, column)
            store(layer, other_result, column + HALF)


@gluon.jit
def start_warps(layer, ring):
    """The four warps of the launch multiply; one more fills the ring."""
    gl.warp_specialize(
        [(multiply, (layer, ring)), (produce, (layer, ring))], worker_num_warps=[1], worker_num_regs=[COPYING]
    )


@gluon.jit
def linear_row(
    weight, input, residual, norm_weight, scale, bias, output, total, features, eps,
    DEPTH: gl.constexpr, PADDED: gl.constexpr, ROUNDS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    FLOAT8: gl.constexpr, NORM: gl.constexpr, GATED: gl.constexpr, SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Programs take tiles in turns; `weight` describes blocks `[HALF, WIDTH]`."""
    weights = gl.allocate_shared_memory(weight.dtype, [2 * STEPS * STAGES, HALF, WIDTH], weight.layout)
    row = gl.allocate_shared_memory(input.dtype.element_ty, [PADDED], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = new_barriers(STAGES)
    # Made where they are passed on: an assignment would turn their constants into tensors.
    start_warps(
        Layer(
            weight, input, residual, norm_weight, scale, bias, output, total, features, eps, DEPTH, ROUNDS, STEPS,
            FLOAT8, NORM, GATED, SCALES, HAS_BIAS,
        ),
        Ring(weights, full, empty, row),
    )  # fmt: skip


def takes(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel reads such tensors: a row of 16 bits, and weights of its dtype or of 8 bits."""
    rows, depth = input.shape
    return (
        rows == 1
        and Gpu.of(input.device).is_hopper
        and input.element_size() == 2
        and weight.dtype in (input.dtype, FLOAT8)
        and weight.is_contiguous()
        and weight.stride(0) == depth
        and weight.numel() > 0
        and depth <= DEEPEST
        and depth * weight.element_size() % (2 * WIDTH.value) == 0
        and weight.data_ptr() % 16 == 0
    )


def row_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """input `[1, K]`, weight `[N, K]` -> input · (weight · scale)ᵀ + bias `[N]`, `[1, N]`, summed in float32.

    A weight of float8_e4m3fn has a float32 scale, `[1]` or `[N]`. The weight must not have been written by the kernels
    just before: copies of it begin while they may still run.
    """
    return _launch(input, None, None, 0.0, weight, bias, scale, gated=False)[0]


def norm_row_linear(
    input: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """total = input + residual, both `[1, K]`; (`row_linear` of norm_weight · total / √(mean(total²) + eps), total).

    `gated`: silu(first half) · second half of the features, `[1, N / 2]`.
    """
    return _launch(input, residual, norm_weight, eps, weight, bias, scale, gated=gated)


def _launch(
    input: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float,
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None, *, gated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    depth, features = input.shape[1], weight.shape[0] // 2 if gated else weight.shape[0]
    output = input.new_empty(1, features)
    total = output if residual is None else input.new_empty(1, depth)
    # A kernel needs a pointer where there is no such operand, too; it is never followed.
    row, *others = (
        output if each is None else each.contiguous() for each in (input, residual, norm_weight, scale, bias)
    )
    numbers, padded = weight.view(input.dtype), triton.next_power_of_2(depth)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE.value, element_bitwidth=16, rank=2)
    blocks = numbers.shape[1] // WIDTH.value
    steps = STEPS if blocks % STEPS == 0 else 1
    tiles = triton.cdiv(features, HALF.value if gated else 2 * HALF.value)
    linear_row[(min(tiles, PROGRAMS * Gpu.of(input.device).processors),)](
        TensorDescriptor.from_tensor(numbers, [HALF.value, WIDTH.value], layout),
        row, *others, output, total, features, eps,
        DEPTH=depth, PADDED=padded, ROUNDS=blocks // steps, STEPS=steps,
        STAGES=(SHARED_MEMORY - 2 * padded) // (4 * HALF.value * WIDTH.value * steps), FLOAT8=weight.dtype == FLOAT8,
        NORM=residual is not None, GATED=gated, SCALES=number_of(scale), HAS_BIAS=bias is not None,
        num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return output, total
