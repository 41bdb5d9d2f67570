"""Attention of few new tokens on Hopper GPUs, decoding above all: what `attend_short` does, in half the instructions.

A program of one warp has a split of a sequence for a kv head. The memory bounds it only if warps keep up with the pages
they ask for, and few of them fit a multiprocessor beside their pages. So all is arranged for a short way through:

    ask for the first pages;  queries and the new key, turned by their angles;  the new key's score begins the softmax;
    in each step: ask for the page after the next, then Q·Kᵀ, softmax, P·V of this one

Products are computed with keys and values on the left, K·Qᵀ and Vᵀ·Pᵀ: a kv head has few query heads, and the least
width of a product is 8 where its least height is 16. P becomes a right operand by one instruction (`transpose`). A page
takes 207 instructions, 430 to 450 in `attend_short`. Which keys a program has is in `hopper_splits.py`.

Attention of a batch in µs on an H200, 32 heads over 8 kv heads, and the time to read its keys; `attend_short` on
another:

    sequences x keys     1 x 193    8 x 193   32 x 193   64 x 193  128 x 193  256 x 193  248 x 343  16 x 8257
    attend_few              5.5        7.6       10.9       16.9       27.8       52.2       93.0      129.1
    attend_short            7.1        9.2       14.1       20.3       31.5       59.6      112.9      131.2
    least                   0.2        1.4        5.7       11.4       22.7       45.4       78.5      121.5

Measured, too (`benchmarks/results/gpu_kernels.json`): queries on the left take 1 to 3 % more, but 1 to 3 % less for few
sequences of thousands of keys. Copies by the tensor memory accelerator cost each warp more instructions than its own
(57.9 µs for 256 x 193 with four slots, its own 56.0). Two pages a step are better for 256 x 193 (52.7, one 55.1, both
with queries on the left) and worse for long contexts; more slots, for which fewer programs fit, are worse throughout.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from enginery.kernels.triton.hopper_ring import HEAD, PAGE
from enginery.kernels.triton.hopper_splits import (
    LINES,
    OF_HEADS,
    OF_ROWS,
    PRODUCT,
    Batch,
    State,
    clear_row,
    find_split,
    list_splits,
    merge_splits,
    store_state,
)
from enginery.kernels.triton.online_softmax import EMPTY, LOG2_E

HALF: gl.constexpr = gl.constexpr(64)
"""Columns that rotary embedding turns into the others."""
STAGES: gl.constexpr = gl.constexpr(3)
"""Slots of a page's keys and values. With a tile for queries a program has 26 KiB (28 for more than 8 heads a kv head),
and a multiprocessor eight programs. With nine, for which the tile would lie in a slot, those of a launch are spread
less evenly: 16 x 8257 takes 138.6 µs instead of 129.1."""
LISTED_PROGRAMS = 64
"""For each kv head: those that look up splits beyond a sequence's first."""
MOST_PLACED = 32
"""Sequences for which the grid has a program for each split; of more, splits are listed."""
LEAST_LISTED = 256
"""Sequences for which the listing is compiled, at least: so that one kernel serves most batches."""

SWIZZLED: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
RIGHT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(1, PRODUCT.value, 2))
HALVES: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0]))
"""Of `[.., HALF]`: 16 bytes a thread."""


class Ring(NamedTuple):
    """Slots `[STAGES, PAGE, HEAD]` of keys and values in shared memory, and a tile of queries `[WIDTH, HEAD]`."""

    key_slots: gl.shared_memory_descriptor
    value_slots: gl.shared_memory_descriptor
    tile: gl.shared_memory_descriptor


class Heads(NamedTuple):
    """Two halves of heads, `[rows, HALF]` each."""

    first: gl.tensor
    second: gl.tensor


@gluon.jit
def copy_page(batch, ring, block, slot):
    """Starts the copy of a block's keys and values of this kv head."""
    rows = gl.arange(0, PAGE, gl.SliceLayout(1, LINES))[:, None]
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, LINES))[None, :]
    place = (gl.program_id(0) * PAGE + rows) * HEAD + columns
    block = block.to(gl.int64)
    keys = batch.key_cache + block * batch.key_block_stride
    values = batch.value_cache + block * batch.value_block_stride
    async_copy.async_copy_global_to_shared(ring.key_slots.index(slot), keys + place, cache_modifier=".cg")
    async_copy.async_copy_global_to_shared(ring.value_slots.index(slot), values + place, cache_modifier=".cg")


@gluon.jit
def load_heads(pointers, inside):
    """Heads at `pointers [rows, 1]`."""
    columns = gl.arange(0, HALF, gl.SliceLayout(0, HALVES))[None, :]
    first = gl.load(pointers + columns, inside, other=0.0)
    return Heads(first, gl.load(pointers + HALF + columns, inside, other=0.0))


@gluon.jit
def store_heads(pointers, heads, inside):
    columns = gl.arange(0, HALF, gl.SliceLayout(0, HALVES))[None, :]
    gl.store(pointers + columns, heads.first, inside)
    gl.store(pointers + HALF + columns, heads.second, inside)


@gluon.jit
def turn(heads, cos, sin):
    """Rotary embedding: x·cos + (−second, first)·sin (Su et al., 2021)."""
    a = heads.first.to(gl.float32)
    b = heads.second.to(gl.float32)
    first = a * cos.first.to(gl.float32) - b * sin.first.to(gl.float32)
    second = b * cos.second.to(gl.float32) + a * sin.second.to(gl.float32)
    return Heads(first.to(heads.first.dtype), second.to(heads.second.dtype))


@gluon.jit
def transpose(data, dtype):
    """`[M, WIDTH]` in 32 bits and PRODUCT's layout -> `[M / 8, 8, WIDTH / 8, 4, 2]` of 16 bits: column `8k + j` of the
    rows `8i + 2l` and `8i + 2l + 1` at `[i, j, k, l]`. One instruction for each block of 8 x 8 in a warp."""
    BLOCKS: gl.constexpr = data.shape[0] // 8
    ASM: gl.constexpr = (
        "cvt.rn." + ("bf16" if dtype == gl.bfloat16 else "f16") + "x2.f32 $0, $2, $1;"
        " movmatrix.sync.aligned.m8n8.trans.b16 $0, $0;"
    )
    even, odd = gl.split(data.reshape([BLOCKS, 8, data.shape[1] // 8, 4, 2]))
    pairs = gl.inline_asm_elementwise(ASM, "=r,r,r", [even, odd], gl.int32, False, 1)
    first = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(first, (pairs >> 16).to(gl.int16).to(dtype, bitcast=True))


@gluon.jit
def attend_page(batch, ring, queries, state, slot, valid, MASKED: gl.constexpr):
    """Takes a page into the state. MASKED: its first `valid` keys; what lies beyond may be NaN, which no weight
    mends."""
    keys = ring.key_slots.index(slot)
    zeros = gl.zeros([PAGE, batch.WIDTH], gl.float32, PRODUCT)
    # Two short chains of products instead of a long one.
    scores = mma_v2(keys.slice(0, HALF, 1).load(LEFT), queries.first, zeros)
    scores += mma_v2(keys.slice(HALF, HALF, 1).load(LEFT), queries.second, zeros)
    if MASKED:
        scores = gl.where((gl.arange(0, PAGE, OF_ROWS) < valid)[:, None], scores, -float("inf"))
    peak = gl.maximum(state.maximum, gl.max(scores, 0) * batch.factor)
    weights = gl.exp2(scores * batch.factor - peak[None, :])
    decay = gl.exp2(state.maximum - peak)
    totals = state.totals * decay[None, :] + weights
    values = ring.value_slots.index(slot).permute((1, 0)).load(LEFT)
    if MASKED:
        inside = gl.arange(0, PAGE, gl.SliceLayout(0, LEFT))[None, :] < valid
        values = gl.where(inside, values, gl.zeros_like(values))
    weights = transpose(weights, values.dtype).permute((0, 3, 4, 2, 1)).reshape([PAGE, batch.WIDTH])
    weights = gl.convert_layout(weights, RIGHT)
    return State(mma_v2(values, weights, state.sums * decay[None, :]), peak, totals)


@gluon.jit
def write_cache(batch, slot, key, value):
    """Puts a new key and value where the cache has room for them."""
    place = (gl.program_id(0) * PAGE + slot % PAGE) * HEAD
    row = gl.arange(0, 1, gl.SliceLayout(1, HALVES))[:, None]
    store_heads(batch.key_cache + slot // PAGE * batch.key_block_stride + place + row, key, slot >= 0)
    store_heads(batch.value_cache + slot // PAGE * batch.value_block_stride + place + row, value, slot >= 0)


@gluon.jit
def attend_new(batch, rows, queries, state, key, values):
    """The state of nothing but a new key `[1, HEAD]`; `rows [PAGE, HEAD]` of shared memory are free, `values` points at
    its value. It comes first, for then there is nothing to scale."""
    blank = gl.zeros([PAGE, HALF], key.first.dtype, HALVES)
    rows.slice(0, HALF, 1).store(gl.broadcast(key.first, blank)[0])
    rows.slice(HALF, HALF, 1).store(gl.broadcast(key.second, blank)[0])
    scores = gl.zeros([PAGE, batch.WIDTH], gl.float32, PRODUCT)
    scores = mma_v2(rows.slice(0, HALF, 1).load(LEFT), queries.first, scores)
    scores = mma_v2(rows.slice(HALF, HALF, 1).load(LEFT), queries.second, scores)
    value = gl.load(values + gl.arange(0, HEAD, OF_ROWS)).to(gl.float32)
    is_first = gl.arange(0, PAGE, OF_ROWS)[:, None] == 0
    totals = gl.where(is_first, state.totals + 1.0, state.totals)
    return State(state.sums + value[:, None], gl.max(scores, 0) * batch.factor, totals)


@gluon.jit
def store_result(batch, token, result):
    """`[HEAD, WIDTH]`, heads as rows."""
    BY_PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [0, 16], [0, 32], [0, 64]] + ([] if batch.WIDTH == 8 else [[8, 0]]),
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [batch.WIDTH, HEAD],
    )  # fmt: skip
    rows = transpose(result, batch.output.dtype.element_ty).permute((2, 1, 0, 3, 4)).reshape([batch.WIDTH, HEAD])
    group = gl.arange(0, batch.WIDTH, gl.SliceLayout(1, BY_PAIRS))
    place = (token.to(gl.int64) * batch.HEADS + gl.program_id(0) * batch.GROUPS + group) * HEAD
    columns = gl.arange(0, HEAD, gl.SliceLayout(0, BY_PAIRS))
    owned = (group < batch.GROUPS)[:, None]
    gl.store(batch.output + place[:, None] + columns[None, :], gl.convert_layout(rows, BY_PAIRS), owned)


@gluon.jit
def attend_token(batch, ring, split, token, cached):
    """A new token, which sees `cached` keys of the cache, and with DECODE itself, on its way there."""
    is_last = split.index == split.splits - 1
    cached = gl.where(is_last, cached, split.high) - split.low
    pages = gl.cdiv(cached, PAGE)
    table = batch.block_tables + split.sequence.to(gl.int64) * batch.table_stride + split.low // PAGE
    last = gl.maximum(pages - 1, 0)
    for page in gl.static_range(STAGES - 1):
        if page < pages:
            copy_page(batch, ring, gl.load(table + page), page)
        async_copy.commit_group()
    # A block is known a step before its copy starts. Behind the last one it is not used.
    block = gl.load(table + gl.minimum(STAGES - 1, last))

    kv_head = gl.program_id(0)
    token = token.to(gl.int64)
    group = gl.arange(0, batch.WIDTH, gl.SliceLayout(1, HALVES))
    rows = batch.query + token * batch.query_stride + ((kv_head * batch.GROUPS + group) * HEAD)[:, None]
    query = load_heads(rows, (group < batch.GROUPS)[:, None])
    row = gl.arange(0, 1, gl.SliceLayout(1, HALVES))[:, None]
    value_row = batch.value + token * batch.value_stride + kv_head * HEAD
    if batch.DECODE:
        key = load_heads(batch.key + token * batch.key_stride + kv_head * HEAD + row, True)
        value = load_heads(value_row + row, True)
        slot = gl.load(batch.slot_mapping + token).to(gl.int64)
        if batch.ROTARY:
            cos = load_heads(batch.cos + token * batch.angle_stride + row, True)
            sin = load_heads(batch.sin + token * batch.angle_stride + row, True)
            query = turn(query, cos, sin)
            key = turn(key, cos, sin)
    left = ring.tile.slice(0, HALF, 1)
    right = ring.tile.slice(HALF, HALF, 1)
    left.store(query.first)
    right.store(query.second)
    queries = Heads(left.permute((1, 0)).load(RIGHT), right.permute((1, 0)).load(RIGHT))

    state = State(
        gl.zeros([HEAD, batch.WIDTH], gl.float32, PRODUCT), gl.full([batch.WIDTH], EMPTY, gl.float32, OF_HEADS),
        gl.zeros([PAGE, batch.WIDTH], gl.float32, PRODUCT),
    )  # fmt: skip
    if batch.DECODE:  # noqa: SIM102 (the compiler knows the first)
        if is_last:
            write_cache(batch, slot, key, value)
            # The last slot is free until the first step.
            state = attend_new(batch, ring.value_slots.index(STAGES - 1), queries, state, key, value_row)

    for page in range(cached // PAGE):
        async_copy.wait_group(STAGES - 2)
        if page + (STAGES - 1) < pages:
            copy_page(batch, ring, block, (page + (STAGES - 1)) % STAGES)
        async_copy.commit_group()
        block = gl.load(table + gl.minimum(page + STAGES, last))
        state = attend_page(batch, ring, queries, state, page % STAGES, PAGE, False)
    async_copy.wait_group(0)
    if cached % PAGE > 0:
        state = attend_page(batch, ring, queries, state, last % STAGES, cached % PAGE, True)

    total = gl.sum(state.totals, 0)
    if batch.SPLITS == 1:  # noqa: SIM114 (the compiler knows it)
        store_result(batch, token, state.sums / total[None, :])
    elif split.splits == 1:
        store_result(batch, token, state.sums / total[None, :])
    else:
        store_state(batch, split, token, state, total)


@gluon.jit
def attend_split(batch, ring, split):
    """Of several splits, the one that ends last merges all."""
    for token in range(split.begin, split.end):
        attend_token(batch, ring, split, token, split.context + (token - split.begin) + (0 if batch.DECODE else 1))
        # All threads have stored before the next token reads the cache, or one counts the program as arrived.
        gl.thread_barrier()
    if batch.SPLITS > 1:  # noqa: SIM102
        if split.splits > 1:
            counter = batch.arrivals + split.sequence * (batch.HEADS // batch.GROUPS) + gl.program_id(0)
            if gl.atomic_add(counter, 1, sem="acq_rel") == split.splits - 1:
                gl.store(counter, 0)
                for token in range(split.begin, split.end):
                    merge_splits(batch, split, token)


@gluon.jit
def attend(batch, ring):
    """All that a program does: the split that its place in the grid names, or some of those that are listed."""
    listing = gl.num_programs(1) - batch.num_sequences
    place = gl.program_id(1)
    rounds = 1
    if batch.LISTED:
        until = gl.zeros([batch.LISTED], gl.int32, gl.BlockedLayout([batch.LISTED // 32], [32], [1], [0]))
        if place < listing:
            until, count = list_splits(batch)
            rounds = gl.cdiv(count - place, listing)
    for number in range(rounds):
        sequence = place - listing
        index = gl.program_id(2)
        if batch.LISTED:  # noqa: SIM102
            if sequence < 0:
                item = place + number * listing
                before = until <= item
                sequence = gl.sum(before.to(gl.int32), 0)
                index = item - gl.max(gl.where(before, until, 0), 0) + 1
        split = find_split(batch, sequence, index)
        if split.begin < split.end:
            attend_split(batch, ring, split)
    if batch.DECODE:
        # A padded batch: row i belongs to nobody if the sequences have fewer tokens.
        row = place - listing
        if (row >= 0) & (gl.program_id(2) == 0) & (row >= gl.load(batch.query_start + batch.num_sequences)):
            clear_row(batch, row)


@gluon.jit(do_not_specialize=["num_sequences", "partial_rows", "table_stride"])
def attend_few(
    query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, cos, sin, output,
    partial_sums, partial_stats, arrivals, num_sequences, partial_rows,
    query_stride, key_stride, value_stride, table_stride, key_block_stride, value_block_stride, angle_stride, factor,
    GROUPS: gl.constexpr, HEADS: gl.constexpr, PADDED_GROUPS: gl.constexpr, WIDTH: gl.constexpr, SHORT: gl.constexpr,
    SPLITS: gl.constexpr, SHARE: gl.constexpr, LISTED: gl.constexpr, DECODE: gl.constexpr, ROTARY: gl.constexpr,
):  # fmt: skip
    """The sequences of at most SHORT new tokens, and with DECODE all, token by token; `factor`: scale ·
    log2(e). LISTED: the grid's second axis has some programs for listed splits, then one for each sequence; 0: it has
    one for each sequence, and the third axis is their splits."""
    keys = gl.allocate_shared_memory(key_cache.dtype.element_ty, [STAGES, PAGE, HEAD], SWIZZLED)
    values = gl.allocate_shared_memory(value_cache.dtype.element_ty, [STAGES, PAGE, HEAD], SWIZZLED)
    tile = gl.allocate_shared_memory(query.dtype.element_ty, [WIDTH, HEAD], SWIZZLED)
    gdc_launch_dependents()
    gdc_wait()
    # Made where it is passed on: an assignment would turn its constants into tensors.
    attend(
        Batch(
            query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, cos, sin,
            output, partial_sums, partial_stats, arrivals, num_sequences, partial_rows, query_stride, key_stride,
            value_stride, table_stride, key_block_stride, value_block_stride, angle_stride, factor,
            GROUPS, HEADS, PADDED_GROUPS, WIDTH, SHORT, SPLITS, SHARE, LISTED, DECODE, ROTARY,
        ),
        Ring(keys, values, tile),
    )  # fmt: skip


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *caches: torch.Tensor) -> bool:
    """Whether the kernel reads such tensors: 16 bits, heads of 128, up to 16 of them for a kv head, pages of 16, rows
    of 16 bytes a thread."""
    tensors = (query, key, value, *caches)
    return (
        query.element_size() == 2
        and query.shape[1] <= PAGE.value * key.shape[1]
        and all(tensor.dtype == query.dtype and tensor.shape[-1] == HEAD.value for tensor in tensors)
        and all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0 for tensor in tensors)
        and all(tensor.stride(1) == HEAD.value and tensor.stride(2) == 1 for tensor in (query, key, value))
        and all(cache.shape[2] == PAGE.value and cache[0].is_contiguous() for cache in caches)
        and all(cache.stride(0) % 16 == 0 for cache in caches)
    )


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    output: torch.Tensor,
    partials: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    partial_rows: int,
    splits: int,
    share: int,
    short: int,
    *,
    decode: bool,
) -> None:
    """Writes the rows of `output` whose sequence has at most `short` new tokens; with `decode` all, and the cache, too.

    `partials`: sums and statistics of splits, and counters that are zero (`attend_short`).
    """
    heads, kv_heads, sequences = query.shape[1], key.shape[1], len(seq_lens)
    groups = heads // kv_heads
    padded_groups = triton.next_power_of_2(groups)
    # A kernel needs pointers where there are no tables, too; they are never followed.
    cos, sin = (query, query) if angles is None else angles
    grid: tuple[int, ...] = (kv_heads, sequences, splits)
    listed = 0
    if splits > 1 and sequences > MOST_PLACED:
        grid = (kv_heads, sequences + LISTED_PROGRAMS, 1)
        listed = max(LEAST_LISTED, triton.next_power_of_2(sequences))
    attend_few[grid](
        query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, cos, sin, output,
        *partials, sequences, partial_rows, query.stride(0), key.stride(0), value.stride(0), block_tables.stride(0),
        key_cache.stride(0), value_cache.stride(0), cos.stride(0), scale * LOG2_E.value,
        GROUPS=groups, HEADS=heads, PADDED_GROUPS=padded_groups, WIDTH=max(8, padded_groups), SHORT=short,
        SPLITS=splits, SHARE=share, LISTED=listed, DECODE=decode, ROTARY=angles is not None, num_warps=1,
        launch_pdl=True,
    )  # fmt: skip
