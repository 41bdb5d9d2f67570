"""Attention of prompts on Hopper, first part: which tiles a program takes, and how their keys reach shared memory.

A *tile* is BLOCK_M tokens of one query head. A *step* of it is BLOCK_N keys that it sees; the masked ones come first
(the diagonal of the new tokens, then the ragged end of the context), then the clear ones (new tokens, then context).

Step p multiplies by the keys of step p and by the values of step p − 1 (`hopper_prompts.py` says why). So a slot of the
ring holds K_p and V_{p−1}, is filled through one barrier and is freed at one place. New keys and values come as boxes
of the projections, cached ones page by page into the same slots; only the addresses differ. The tensor memory
accelerator (TMA) copies both.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

HEAD: gl.constexpr = gl.constexpr(128)
PAGE: gl.constexpr = gl.constexpr(16)
BLOCK_M: gl.constexpr = gl.constexpr(128)
BLOCK_N: gl.constexpr = gl.constexpr(128)
STAGES: gl.constexpr = gl.constexpr(3)
"""Slots of the ring: 192 KiB of shared memory, beside 32 for the queries."""
HALF: gl.constexpr = gl.constexpr(64)
"""Columns of 16 bits that the 128-byte swizzle of shared memory takes: a row of a head is two of them."""
SWIZZLED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


class Batch(NamedTuple):
    """What a launch is given."""

    query: gl.tensor
    output: gl.tensor
    new_keys: tma.tensor_descriptor
    new_values: tma.tensor_descriptor
    key_pages: tma.tensor_descriptor
    value_pages: tma.tensor_descriptor
    block_tables: gl.tensor
    query_start: gl.tensor
    seq_lens: gl.tensor
    num_sequences: gl.tensor
    query_stride: gl.tensor
    table_stride: gl.tensor
    key_block_rows: gl.tensor
    value_block_rows: gl.tensor
    factor: gl.tensor
    GROUPS: gl.constexpr
    HEADS: gl.constexpr
    PADDED_SEQUENCES: gl.constexpr
    SHORT: gl.constexpr


class Ring(NamedTuple):
    """Slots `[STAGES, BLOCK_N, HEAD]` of keys and values in shared memory, and their barriers `[STAGES, 1]`."""

    key_slots: gl.shared_memory_descriptor
    value_slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Tile(NamedTuple):
    """Tokens `begin + first ..` of a sequence of `length` new ones after `context` cached ones; how many steps it has.

    The fields `masked_...` say how many of them need a mask.
    """

    begin: gl.tensor
    first: gl.tensor
    length: gl.tensor
    context: gl.tensor
    table: gl.tensor
    head: gl.tensor
    new_steps: gl.tensor
    context_steps: gl.tensor
    masked_new: gl.tensor
    masked_context: gl.tensor


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def count_tiles(batch):
    """For each sequence its tiles, and those of it and all before, of one head; then the number of tiles of all heads.

    Each warp looks through all sequences by itself, at least as many as it has lanes. Then every lane of it finds the
    same, and ptxas knows that: addresses in the ring stay in uniform registers. Were the warps to share the search,
    the sums would come from shared memory, and the addresses would cost registers of each thread.
    """
    layout: gl.constexpr = gl.BlockedLayout([batch.PADDED_SEQUENCES // 32], [32], [gl.num_warps()], [0])
    candidates = gl.arange(0, batch.PADDED_SEQUENCES, layout)
    inside = candidates < batch.num_sequences
    starts = gl.load(batch.query_start + candidates, inside, other=0)
    lengths = gl.load(batch.query_start + candidates + 1, inside, other=0) - starts
    tiles = gl.where(lengths > batch.SHORT, (lengths + (BLOCK_M - 1)) // BLOCK_M, 0)
    return tiles, gl.associative_scan(tiles, 0, plus), gl.sum(tiles, 0) * batch.HEADS


@gluon.jit
def item_of(turn):
    """The item that a program takes in its turn: every second round goes backwards, which evens the programs' work."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def find_tile(batch, tiles, tiles_until, items, item):
    """The item's tile. The last tiles of a sequence see the most keys: they come first."""
    index = items // batch.HEADS - 1 - item // batch.HEADS
    before = tiles_until <= index
    sequence = gl.sum(before.to(gl.int32), 0)
    first = (index - gl.sum(gl.where(before, tiles, 0), 0)) * BLOCK_M
    begin = gl.load(batch.query_start + sequence)
    length = gl.load(batch.query_start + sequence + 1) - begin
    context = gl.load(batch.seq_lens + sequence) - length
    new_steps = gl.cdiv(gl.minimum(first + BLOCK_M, length), BLOCK_N)
    context_steps = gl.cdiv(context, BLOCK_N)
    return Tile(
        begin=begin,
        first=first,
        length=length,
        context=context,
        table=batch.block_tables + sequence.to(gl.int64) * batch.table_stride,
        head=item % batch.HEADS,
        new_steps=new_steps,
        context_steps=context_steps,
        masked_new=new_steps - (first + 1) // BLOCK_N,
        masked_context=context_steps - context // BLOCK_N,
    )


@gluon.jit
def locate(tile, step):
    """(whether the step's keys are new ones, the first of them)"""
    after_masked = step >= tile.masked_new + tile.masked_context
    new_place = step - gl.where(after_masked, tile.masked_context, 0)
    is_new = (step < tile.masked_new) | (after_masked & (new_place < tile.new_steps))
    context_place = step - gl.where(after_masked, tile.new_steps, tile.masked_new)
    place = gl.where(is_new, tile.new_steps - 1 - new_place, tile.context_steps - 1 - context_place)
    return is_new, place * BLOCK_N


@gluon.jit
def valid_rows(tile, step):
    """How many keys from a step's first one on the sequence has."""
    is_new, start = locate(tile, step)
    return gl.where(is_new, tile.length, tile.context) - start


@gluon.jit
def pages_of(slot):
    """A slot `[BLOCK_N, HEAD]` in pieces `[PAGE, HALF]`: the swizzled layout puts the left halves of all rows first."""
    return slot._reinterpret(gl.bfloat16, [HEAD // HALF * BLOCK_N // PAGE, PAGE, HALF], SWIZZLED)


@gluon.jit
def copy_step(tile, new_rows, pages, block_rows, kv_head, step, barrier, target):
    """Starts the copy of a step's keys or values into the slot `target`."""
    is_new, start = locate(tile, step)
    if is_new:
        tma.async_copy_global_to_shared(new_rows, [tile.begin + start, kv_head * HEAD], barrier, target)
    else:
        pieces = pages_of(target)
        last = (tile.context - 1) // PAGE
        for place in gl.static_range(BLOCK_N // PAGE):
            # Past the end some page has to come, so that the number of bytes stays the same.
            block = gl.load(tile.table + gl.minimum(start // PAGE + place, last))
            row = block * block_rows + kv_head * PAGE
            for half in gl.static_range(HEAD // HALF):
                piece = pieces.index(half * (BLOCK_N // PAGE) + place)
                tma.async_copy_global_to_shared(pages, [row, half * HALF], barrier, piece)


@gluon.jit
def fill(batch, tile, ring, slot, step, steps):
    """Starts the copies of what a step reads, its keys and the values of the step before; there are steps 0..steps."""
    BYTES: gl.constexpr = BLOCK_N * HEAD * 2
    barrier = ring.full.index(slot)
    kv_head = tile.head // batch.GROUPS
    if step * (steps - step) == 0:
        mbarrier.expect(barrier, BYTES)
    else:
        mbarrier.expect(barrier, 2 * BYTES)
    if step < steps:
        target = ring.key_slots.index(slot)
        copy_step(tile, batch.new_keys, batch.key_pages, batch.key_block_rows, kv_head, step, barrier, target)
    if step > 0:
        target = ring.value_slots.index(slot)
        copy_step(tile, batch.new_values, batch.value_pages, batch.value_block_rows, kv_head, step - 1, barrier, target)


@gluon.jit
def produce(batch, ring):
    """The warp that fills the ring, through all tiles of its program; it runs ahead into the next one."""
    tiles, tiles_until, items = count_tiles(batch)
    done = 0
    for turn in range(gl.cdiv(items, gl.num_programs(0))):
        item = item_of(turn)
        if item < items:
            tile = find_tile(batch, tiles, tiles_until, items, item)
            steps = tile.new_steps + tile.context_steps
            for step in range(steps + 1):
                slot = (done + step) % STAGES
                # A barrier begins as if a phase with parity 1 had just ended: the first round finds all slots free.
                mbarrier.wait(ring.empty.index(slot), (done + step) // STAGES & 1 ^ 1)
                fill(batch, tile, ring, slot, step, steps)
            done += steps + 1


@gluon.jit
def wait_full(ring, place):
    """Until the copies of a step, the place-th of the program, have arrived; its slot."""
    slot = place % STAGES
    mbarrier.wait(ring.full.index(slot), place // STAGES & 1)
    return slot
