"""Gated linear layers of up to 128 rows on Hopper GPUs: silu(x · gateᵀ) · (x · upᵀ), in one pass over the weight.

The bytes of the weight bound so few rows, so the kernel is built around their stream. A program has HALF features: as
many rows of gate and the rows of up that belong to them, one above the other in a tile. A warp copies it to a ring in
shared memory, 128 bytes of depth a step (by the tensor memory accelerator, TMA); a warpgroup multiplies:

    copies      weights of the first steps;  wait for the kernel ahead;  inputs of these steps;
                each further step when its slot is empty;  let the next kernel in
    multiplies  wait for the kernel ahead;  in each step: start its product;  wait for the one before, whose slot is
                empty then;  at the end the activation: gate and up of a feature are sums of the same thread

Two programs share a multiprocessor: one reads while the other starts or ends. Inputs are copied in pieces of 16 rows,
and only those that there are: TMA takes longer to fill in rows than to copy them (65 rows as 128: 93 µs instead of 69).

Norm, gate and up of an 8B decoder (28672 × 4096), in µs on an H200; beside it `linear_tiles` with the gate inside up to
64 rows, above them cuBLAS by measured algorithms, and a kernel for the gate:

    rows                48            64            80            96            128
    bfloat16     66.9 (66.2)   68.2 (66.8)   69.6 (68.5)   69.6 (71.8)   71.0 (74.4)
    float8       35.9 (41.3)   36.7 (42.2)   39.4 (41.9)   40.1 (43.4)   41.6 (43.8)

With the rest of a layer around it, the times of which depend on what runs before, it takes 1 to 2 % off a layer of 80
to 128 rows in bfloat16, 4 to 5 % off one of 48 or 64 in float8, and nothing off one of more. With fewer tiles in
bfloat16 (128 of them, 96 rows: 40 instead of 35 µs), or more than run at once (296: 107 instead of 84), it loses.

Measured to lose, too: the same stream for weights of fewer features, their depth split over programs that add up in
memory (128 rows in bfloat16, against cuBLAS: 40.5 and 38.8 for 4096 × 14336, 15.7 and 14.3 for 4096 × 4096; only 64
rows of the former gained, 35.4 and 36.4); equal shares of all steps for each multiprocessor, tiles cut where a share
ends (71.3 where whole tiles took 66.0); and 256 rows (101.2, cuBLAS with its gate 99.9).
"""

import math
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from enginery.kernels.triton.float8 import number_of
from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.hopper_barriers import locate, new_barriers
from enginery.ops.precision import FLOAT8

HALF: gl.constexpr = gl.constexpr(64)
"""Features of a program."""
PIECE: gl.constexpr = gl.constexpr(16)
"""Rows of the input that are copied at once."""
LINE = 128
"""Bytes of depth in a step: the width of the swizzle of shared memory."""
RING = 96 << 10
"""Bytes of all slots of a program."""
REGISTERS = 128
"""Of a thread at the start, so that two programs of eight warps fit: four to multiply, and four of which one copies."""
COPYING: gl.constexpr = gl.constexpr(40)
"""Of a thread that copies; those that multiply get what it gives."""


class Bounds(NamedTuple):
    """Where the kernel was the fastest: the rows of the input, and tiles for each multiprocessor."""

    rows: range
    least_tiles: float
    most_tiles: float


BOUNDS = {torch.bfloat16: Bounds(range(65, 129), 1.5, 2.0), FLOAT8: Bounds(range(33, 65), 0.95, math.inf)}


class Layer(NamedTuple):
    """What a launch is given."""

    weight: tma.tensor_descriptor
    input: tma.tensor_descriptor
    scale: gl.tensor
    input_scale: gl.tensor
    bias: gl.tensor
    output: gl.tensor
    rows: gl.tensor
    features: gl.tensor
    PIECES: gl.constexpr
    STEPS: gl.constexpr
    SCALES: gl.constexpr
    HAS_BIAS: gl.constexpr


class Ring(NamedTuple):
    """Slots of weights `[STAGES, 2·HALF, BLOCK_K]` and inputs `[STAGES, ROWS, BLOCK_K]`; barriers `[STAGES, 1]`."""

    weights: gl.shared_memory_descriptor
    inputs: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def copy_weights(layer, ring, step):
    """Starts the copies of a step's gates and ups, and says how many bytes it will have with its inputs.

    Past the last feature the gates are followed by rows of up, and the ups by zeros; neither is stored.
    """
    STAGES: gl.constexpr = ring.full.shape[0]
    BLOCK_K: gl.constexpr = ring.weights.shape[2]
    halves = ring.weights._reinterpret(ring.weights.dtype, [2 * STAGES, HALF, BLOCK_K], ring.weights.layout)
    slot, _ = locate(ring, step)
    barrier = ring.full.index(slot)
    mbarrier.expect(barrier, 2 * layer.weight.block_type.nbytes + layer.PIECES * layer.input.block_type.nbytes)
    for half in gl.static_range(2):
        place = [half * layer.features + gl.program_id(0) * HALF, step * BLOCK_K]
        tma.async_copy_global_to_shared(layer.weight, place, barrier, halves.index(2 * slot + half))


@gluon.jit
def copy_inputs(layer, ring, step):
    """Starts the copies of a step's inputs: of the rows that there are, for TMA takes its time to fill in others. What
    then lies in the rest of the slot goes into rows of the sums that nobody stores."""
    STAGES: gl.constexpr = ring.full.shape[0]
    ROWS: gl.constexpr = ring.inputs.shape[1]
    BLOCK_K: gl.constexpr = ring.weights.shape[2]
    pieces = ring.inputs._reinterpret(ring.inputs.dtype, [STAGES * ROWS // PIECE, PIECE, BLOCK_K], ring.inputs.layout)
    slot, _ = locate(ring, step)
    for piece in gl.static_range(layer.PIECES):
        target = pieces.index(slot * (ROWS // PIECE) + piece)
        tma.async_copy_global_to_shared(layer.input, [piece * PIECE, step * BLOCK_K], ring.full.index(slot), target)


@gluon.jit
def produce(layer, ring):
    """The warp that fills the ring. No kernel writes weights, so their copies need not wait for the one ahead."""
    AHEAD: gl.constexpr = min(ring.full.shape[0], layer.STEPS)
    for step in gl.static_range(AHEAD):
        copy_weights(layer, ring, step)
    gdc_wait()
    for step in gl.static_range(AHEAD):
        copy_inputs(layer, ring, step)
    for step in range(AHEAD, layer.STEPS):
        slot, parity = locate(ring, step)
        # Until the step that had the slot in the round before has given it back.
        mbarrier.wait(ring.empty.index(slot), parity ^ 1)
        copy_weights(layer, ring, step)
        copy_inputs(layer, ring, step)
    gdc_launch_dependents()


@gluon.jit
def store_gated(layer, sums):
    """The output of sums `[ROWS, 2·HALF]`, gates beside ups: times the scales, plus the bias, silu(gate) · up."""
    layout: gl.constexpr = sums.type.layout
    first = gl.program_id(0) * HALF
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, layout))
    place = gl.arange(0, 2 * HALF, gl.SliceLayout(0, layout))
    source = gl.minimum(first + place % HALF, layer.features - 1) + place // HALF * layer.features
    if layer.SCALES > 0:
        sums *= gl.load(layer.input_scale + row, row < layer.rows, other=0.0)[:, None]
        if layer.SCALES == 1:
            sums *= gl.load(layer.scale)
        else:
            sums *= gl.load(layer.scale + source)[None, :]
    if layer.HAS_BIAS:
        sums += gl.load(layer.bias + source).to(gl.float32)[None, :]
    gates, ups = gl.split(sums.reshape([sums.shape[0], 2, HALF]).permute((0, 2, 1)))
    result = gates / (1 + gl.exp(-gates)) * ups

    outputs: gl.constexpr = result.type.layout
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, outputs))[:, None]
    column = (first + gl.arange(0, HALF, gl.SliceLayout(0, outputs)))[None, :]
    pointers = layer.output + row.to(gl.int64) * layer.features + column
    gl.store(pointers, result.to(layer.output.dtype.element_ty), (row < layer.rows) & (column < layer.features))


@gluon.jit
def consume(layer, ring):
    """The warpgroup that multiplies: always one product while the next is started."""
    STAGES: gl.constexpr = ring.full.shape[0]
    ROWS: gl.constexpr = ring.inputs.shape[1]
    SIZE: gl.constexpr = ring.weights.dtype.primitive_bitwidth // 8
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * HALF, 32 // SIZE])
    gdc_wait()
    sums = gl.zeros([ROWS, 2 * HALF], gl.float32, PRODUCT)
    for step in range(layer.STEPS):
        slot, parity = locate(ring, step)
        mbarrier.wait(ring.full.index(slot), parity)
        weights = ring.weights.index(slot).permute((1, 0))
        sums = warpgroup_mma(ring.inputs.index(slot), weights, sums, is_async=True)
        sums = warpgroup_mma_wait(1, (sums,))
        mbarrier.arrive(ring.empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
    store_gated(layer, warpgroup_mma_wait(0, (sums,)))


@gluon.jit
def start_warps(layer, ring):
    """The four warps of the launch multiply; one more fills the ring."""
    gl.warp_specialize(
        [(consume, (layer, ring)), (produce, (layer, ring))], worker_num_warps=[1], worker_num_regs=[COPYING]
    )


@gluon.jit(do_not_specialize=["rows"])
def linear_gated(
    weight, input, scale, input_scale, bias, output, rows, features,
    ROWS: gl.constexpr, PIECES: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One program per HALF features; `weight` describes blocks `[HALF, BLOCK_K]`, `input` blocks `[PIECE, BLOCK_K]`."""
    BLOCK_K: gl.constexpr = input.block_shape[1]
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, 2 * HALF, BLOCK_K], weight.layout)
    inputs = gl.allocate_shared_memory(input.dtype, [STAGES, ROWS, BLOCK_K], input.layout)
    full, empty = new_barriers(STAGES)
    # Made where they are passed on: an assignment would turn their constants into tensors.
    start_warps(
        Layer(weight, input, scale, input_scale, bias, output, rows, features, PIECES, STEPS, SCALES, HAS_BIAS),
        Ring(weights, inputs, full, empty),
    )


def takes(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel reads such tensors, and is the fastest for them."""
    rows, depth = input.shape
    bounds, gpu = BOUNDS.get(weight.dtype), Gpu.of(input.device)
    if bounds is None or rows not in bounds.rows or not gpu.is_hopper:
        return False
    tiles = triton.cdiv(weight.shape[0] // 2, HALF.value) / gpu.processors
    return (
        bounds.least_tiles <= tiles <= bounds.most_tiles
        and input.dtype == weight.dtype
        and weight.is_contiguous()
        and depth > 0
        and depth * weight.element_size() % LINE == 0
        and input.stride(1) == 1
        and input.stride(0) >= depth
        and all(number % 16 == 0 for number in (weight.data_ptr(), input.data_ptr()))
        and input.stride(0) * input.element_size() % 16 == 0
    )


def gated_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """input `[M, K]`, M ≤ 128; weight `[2·N, K]`, gate above up -> silu(gates) · ups `[M, N]`, in bfloat16.

    Gates and ups are input · (weight · scale)ᵀ + bias `[2·N]`, summed in float32. Both operands are bfloat16 or both
    float8_e4m3fn; these have float32 scales, the weight's `[1]` or `[2·N]` and `input_scale` `[M]`, and tensor cores
    may keep less than float32 of their sums. The weight must not have been written by the kernel before: copies of it
    begin while that may still run. It lies, and so do the rows of the input, as `takes` says.
    """
    rows, depth = input.shape
    features, size = weight.shape[0] // 2, weight.element_size()
    padded, block_k = 64 if rows <= 64 else 128, LINE // size
    layout = gl.NVMMASharedLayout(swizzle_byte_width=LINE, element_bitwidth=8 * size, rank=2)
    output = torch.empty(rows, features, dtype=torch.bfloat16, device=input.device)
    # A kernel needs a pointer where there is no scale or bias, too; it is never followed.
    pointers = (output if each is None else each.contiguous() for each in (scale, input_scale, bias))
    linear_gated[(triton.cdiv(features, HALF.value),)](
        TensorDescriptor.from_tensor(weight, [HALF.value, block_k], layout),
        TensorDescriptor.from_tensor(input, [PIECE.value, block_k], layout),
        *pointers, output, rows, features, ROWS=padded, PIECES=triton.cdiv(rows, PIECE.value),
        STEPS=depth // block_k, STAGES=RING // ((2 * HALF.value + padded) * LINE),
        SCALES=number_of(scale), HAS_BIAS=bias is not None,
        num_warps=4, maxnreg=REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return output
