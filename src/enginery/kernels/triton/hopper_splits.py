"""Attention of few new tokens on Hopper, first part: which keys a program takes, and where its result goes.

The keys of a sequence are cut into *splits* (`attention_plan.plan_splits`). Of few sequences each split has a place in
the grid. Of many most have but one, and in a grid of sequences by splits thousands of programs find nothing to do:
ahead of the others they cost 6 µs at 256 sequences on an H200, and behind them what is left of long contexts comes
last (248 of different lengths: 101 µs instead of 94). So the splits beyond the first are listed: some programs count
them over all sequences and take every n-th of them, before the programs for first splits start.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from enginery.kernels.triton.hopper_ring import HEAD, PAGE, plus
from enginery.kernels.triton.online_softmax import EMPTY

MERGED: gl.constexpr = gl.constexpr(32)
"""Heads of splits that are merged at once: 128 numbers for each thread."""

PRODUCT: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
"""How a warp holds scores `[PAGE, WIDTH]` and sums `[HEAD, WIDTH]`: a column for each query head of the kv head."""
OF_ROWS: gl.constexpr = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))
OF_HEADS: gl.constexpr = gl.constexpr(gl.SliceLayout(0, PRODUCT.value))
LINES: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))
"""Of `[.., HEAD]` on its way from or to memory: 16 bytes a thread."""


class Batch(NamedTuple):
    """What a launch is given."""

    query: gl.tensor
    key: gl.tensor
    value: gl.tensor
    key_cache: gl.tensor
    value_cache: gl.tensor
    slot_mapping: gl.tensor
    block_tables: gl.tensor
    query_start: gl.tensor
    seq_lens: gl.tensor
    cos: gl.tensor
    sin: gl.tensor
    output: gl.tensor
    partial_sums: gl.tensor
    partial_stats: gl.tensor
    arrivals: gl.tensor
    num_sequences: gl.tensor
    partial_rows: gl.tensor
    query_stride: gl.tensor
    key_stride: gl.tensor
    value_stride: gl.tensor
    table_stride: gl.tensor
    key_block_stride: gl.tensor
    value_block_stride: gl.tensor
    angle_stride: gl.tensor
    factor: gl.tensor
    GROUPS: gl.constexpr
    HEADS: gl.constexpr
    PADDED_GROUPS: gl.constexpr
    WIDTH: gl.constexpr
    SHORT: gl.constexpr
    SPLITS: gl.constexpr
    SHARE: gl.constexpr
    LISTED: gl.constexpr
    DECODE: gl.constexpr
    ROTARY: gl.constexpr


class Split(NamedTuple):
    """The keys low..high of a sequence, whose new tokens are begin..end; the last split has all from low on."""

    sequence: gl.tensor
    index: gl.tensor
    splits: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    context: gl.tensor
    low: gl.tensor
    high: gl.tensor


class State(NamedTuple):
    """Of a token's heads: Σ 2^(s − maximum)·v, the largest score in units of log2, and the parts `[PAGE, WIDTH]` of
    Σ 2^(s − maximum)."""

    sums: gl.tensor
    maximum: gl.tensor
    totals: gl.tensor


@gluon.jit
def splits_of(batch, context):
    """As many as get SHARE pages each, but no more than SPLITS."""
    return gl.minimum(gl.maximum(gl.cdiv(context, batch.SHARE * PAGE), 1), batch.SPLITS)


@gluon.jit
def find_split(batch, sequence, index):
    """Empty (begin is end) if there is no such split, or the sequence has too many new tokens."""
    begin = gl.load(batch.query_start + sequence)
    end = gl.load(batch.query_start + sequence + 1)
    context = gl.load(batch.seq_lens + sequence) - (end - begin)
    if not batch.DECODE:
        end = gl.where(end - begin > batch.SHORT, begin, end)
    splits = splits_of(batch, context)
    end = gl.where(index < splits, end, begin)
    share = gl.cdiv(gl.cdiv(context, PAGE), splits) * PAGE
    # The last one has the page that is not full, if no other: new tokens go on there, and nobody else may read them.
    rest = gl.minimum((splits - 1) * share, context // PAGE * PAGE)
    low = gl.minimum(index * share, rest)
    return Split(sequence, index, splits, begin, end, context, low, gl.minimum(low + share, rest))


@gluon.jit
def list_splits(batch):
    """For each sequence the splits beyond the first, of it and all before; then of all."""
    LANES: gl.constexpr = gl.BlockedLayout([batch.LISTED // 32], [32], [1], [0])
    candidates = gl.arange(0, batch.LISTED, LANES)
    inside = candidates < batch.num_sequences
    starts = gl.load(batch.query_start + candidates, inside, other=0)
    lengths = gl.load(batch.query_start + candidates + 1, inside, other=0) - starts
    contexts = gl.load(batch.seq_lens + candidates, inside, other=0) - lengths
    more = gl.where(lengths > 0, splits_of(batch, contexts) - 1, 0)
    if not batch.DECODE:
        more = gl.where(lengths > batch.SHORT, 0, more)
    return gl.associative_scan(more, 0, plus), gl.sum(more, 0)


@gluon.jit
def row_of(batch, split, token):
    """Of the states of a token's splits."""
    if batch.DECODE:
        return token
    return split.sequence * batch.SHORT + token - split.begin


@gluon.jit
def store_state(batch, split, token, state, total):
    """For the program that merges the splits: `partial_sums [SPLITS, rows, Hq, HEAD]`, `partial_stats [2, SPLITS, rows,
    Hq]`; a row is a token (DECODE), or sequence · SHORT + i."""
    group = gl.arange(0, batch.WIDTH, OF_HEADS)
    owned = group < batch.GROUPS
    row = split.index * batch.partial_rows + row_of(batch, split, token)
    place = row * batch.HEADS + gl.program_id(0) * batch.GROUPS + group
    gl.store(batch.partial_stats + place, state.maximum, owned)
    gl.store(batch.partial_stats + batch.SPLITS * batch.partial_rows * batch.HEADS + place, total, owned)
    pointers = batch.partial_sums + place.to(gl.int64)[None, :] * HEAD + gl.arange(0, HEAD, OF_ROWS)[:, None]
    gl.store(pointers, state.sums, owned[None, :])


@gluon.jit
def merge_splits(batch, split, token):
    """A new token's Σ 2^(m_i − m)·sums_i / Σ 2^(m_i − m)·total_i over the splits i.

    Other programs wrote them a moment ago: they are read past the L1 cache.
    """
    GROUPS: gl.constexpr = batch.PADDED_GROUPS
    FAN: gl.constexpr = MERGED // GROUPS
    CUBES: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 1, 1], [2, 1, 0])
    PLANES: gl.constexpr = gl.SliceLayout(2, CUBES)
    SHEETS: gl.constexpr = gl.SliceLayout(0, CUBES)
    row = row_of(batch, split, token)
    first_head = gl.program_id(0) * batch.GROUPS
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, gl.SliceLayout(1, CUBES)))
    group = gl.arange(0, GROUPS, gl.SliceLayout(0, PLANES))
    parts = gl.arange(0, FAN, gl.SliceLayout(1, PLANES))
    sums = gl.zeros([GROUPS, HEAD], gl.float32, SHEETS)
    maximum = gl.full([GROUPS], EMPTY, gl.float32, gl.SliceLayout(0, PLANES))
    total = gl.zeros([GROUPS], gl.float32, gl.SliceLayout(0, PLANES))
    for first in range(0, split.splits, FAN):
        inside = (first + parts < split.splits)[:, None] & (group < batch.GROUPS)[None, :]
        place = ((first + parts) * batch.partial_rows + row) * batch.HEADS + first_head
        place = place[:, None] + group[None, :]
        maxima = gl.load(batch.partial_stats + place, inside, other=EMPTY, cache_modifier=".cg")
        totals_of = batch.partial_stats + batch.SPLITS * batch.partial_rows * batch.HEADS
        totals = gl.load(totals_of + place, inside, other=0.0, cache_modifier=".cg")
        pointers = batch.partial_sums + place.to(gl.int64)[:, :, None] * HEAD + columns[None, None, :]
        data = gl.load(pointers, inside[:, :, None], other=0.0, cache_modifier=".cg")
        peak = gl.maximum(maximum, gl.max(maxima, 0))
        weights = gl.exp2(maxima - peak[None, :])
        decay = gl.exp2(maximum - peak)
        total = total * decay + gl.sum(totals * weights, 0)
        sums = sums * gl.convert_layout(decay, gl.SliceLayout(1, SHEETS))[:, None]
        sums += gl.sum(data * weights[:, :, None], 0)
        maximum = peak
    result = sums / gl.convert_layout(total, gl.SliceLayout(1, SHEETS))[:, None]
    group = gl.arange(0, GROUPS, gl.SliceLayout(1, SHEETS))
    rows = (token.to(gl.int64) * batch.HEADS + first_head + group) * HEAD
    pointers = batch.output + rows[:, None] + gl.arange(0, HEAD, gl.SliceLayout(0, SHEETS))[None, :]
    gl.store(pointers, result.to(batch.output.dtype.element_ty), (group < batch.GROUPS)[:, None])


@gluon.jit
def clear_row(batch, token):
    """Zeroes the output of a token of no sequence."""
    rows = gl.arange(0, batch.WIDTH, gl.SliceLayout(1, LINES))
    place = (token.to(gl.int64) * batch.HEADS + gl.program_id(0) * batch.GROUPS + rows) * HEAD
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, LINES))
    blank = gl.zeros([batch.WIDTH, HEAD], batch.output.dtype.element_ty, LINES)
    gl.store(batch.output + place[:, None] + columns[None, :], blank, (rows < batch.GROUPS)[:, None])
