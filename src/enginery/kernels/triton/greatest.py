"""`enginery::greatest` on NVIDIA GPUs: rows are cut into tiles, which together fill the GPU; one launch does it all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enginery.ops.greatest import greatest_reference

TILE = 8192
"""columns of one program"""
MOST_TILES = 128
"""of a row"""


@triton.jit
def larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def first_equal(values, places, top):
    """The place of the first of the `values` that is `top`. If that is NaN, it is the first NaN; else there is none."""
    return tl.min(tl.where((values == top) | (values != values), places, 0x7FFFFFFF), 0)


@triton.jit
def argmax_rows(logits, best, columns, tops, arrivals, row_stride, width, TILE: tl.constexpr, MOST_TILES: tl.constexpr):
    """One program per tile and row. Each leaves the greatest of its tile in `tops [M, MOST_TILES]`; the last of a row
    to arrive, which `arrivals [M]` tells, looks the greatest of them up in its tile, and sets the counter to zero."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    own, inside = logits + row * row_stride, tl.arange(0, TILE)
    places = tile * TILE + inside
    values = tl.load(own + places, places < width, other=float("-inf")).to(tl.float32)
    tl.store(tops + row * MOST_TILES + tile, tl.reduce(values, 0, larger))
    # All threads have stored before one of them counts the program as arrived.
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tiles - 1:
        tl.store(arrivals + row, 0)
        numbers = tl.arange(0, MOST_TILES)
        each = tl.load(tops + row * MOST_TILES + numbers, numbers < tiles, other=float("-inf"))
        top = tl.reduce(each, 0, larger)
        places = first_equal(each, numbers, top) * TILE + inside
        values = tl.load(own + places, places < width, other=float("-inf")).to(tl.float32)
        tl.store(best + row, top)
        tl.store(columns + row, first_equal(values, places, top).to(tl.int64))


def greatest(
    logits: torch.Tensor, *, arrivals: torch.Tensor | None = None, tile: int = TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `enginery::greatest`; in 64 bits, for which the kernel is not made, by the reference.

    `arrivals`: of `paged_attention.new_arrivals`; without, or with too few, a call has its own. `tile`: a power of 2.
    """
    if logits.dtype == torch.float64:
        return greatest_reference(logits)
    rows, width = logits.shape
    best, columns = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return best, columns
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if arrivals is None or len(arrivals) < rows:
        arrivals = logits.new_zeros(rows, dtype=torch.int32)
    tops = logits.new_empty(rows, MOST_TILES, dtype=torch.float32)
    while width > tile * MOST_TILES:
        tile *= 2
    # This runs in every step, outside its graph, and Triton's cdiv would take the host as long as an allocation.
    argmax_rows[-(-width // tile), rows](
        logits, best, columns, tops, arrivals, logits.stride(0), width,
        TILE=tile, MOST_TILES=MOST_TILES, num_warps=8,
    )  # fmt: skip
    return best, columns
