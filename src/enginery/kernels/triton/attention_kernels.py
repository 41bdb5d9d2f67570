"""The kernels of paged attention on NVIDIA GPUs; `paged_attention.py` says which run when, and on what grid."""

from __future__ import annotations

import triton
import triton.language as tl

from enginery.kernels.triton.dependent_launch import wait
from enginery.kernels.triton.online_softmax import EMPTY, LOG2_E, attend_one, attend_range, attend_tiles, load_rows

BATCH_SIZES = ["num_sequences", "partial_rows", "table_stride"]
"""Arguments that change from step to step: compiling for their divisibility would stall a server."""


@triton.jit
def store_rows(pointer, offsets, columns, data, inside, ROW: tl.constexpr):
    """Writes the first ROW columns of the rows that are `inside`."""
    tl.store(pointer + offsets[:, None] + columns[None, :], data, mask=inside[:, None] & (columns < ROW)[None, :])


@triton.jit
def load_head(pointer, columns, inside, cos, sin, ROTARY: tl.constexpr, ROW: tl.constexpr):
    """One head `[columns]` of a token, with ROTARY turned by its position: x·cos + turn(x)·sin (Su et al., 2021).

    turn(first half, second) = (−second, first); `cos` and `sin` point at the token's rows of the tables.
    """
    data = tl.load(pointer + columns, inside, other=0.0)
    if ROTARY:
        partners, sign = turned(columns, ROW)
        partner = tl.load(pointer + partners, inside, other=0.0).to(tl.float32)
        cosine = tl.load(cos + columns, inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + columns, inside, other=0.0).to(tl.float32)
        data = (data.to(tl.float32) * cosine + sign * partner * sine).to(data.dtype)
    return data


@triton.jit
def load_heads(
    pointer, offsets, columns, inside, cos, sin, angles, ROTARY: tl.constexpr, ROW: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """`load_rows` of heads, with ROTARY turned as in `load_head`; `angles`: where each row's tables begin."""
    data = load_rows(pointer, offsets, columns, inside, ROW, PADDED, True)
    if ROTARY:
        partners, sign = turned(columns, ROW)
        partner = tl.load(
            pointer + offsets[:, None] + partners[None, :], inside[:, None] & (columns < ROW)[None, :], other=0.0
        ).to(tl.float32)
        cosine = load_rows(cos, angles, columns, inside, ROW, PADDED, True).to(tl.float32)
        sine = load_rows(sin, angles, columns, inside, ROW, PADDED, True).to(tl.float32)
        data = (data.to(tl.float32) * cosine + sign[None, :] * partner * sine).to(data.dtype)
    return data


@triton.jit
def turned(columns, ROW: tl.constexpr):
    """For each column the one of the other half that it is mixed with, and that one's sign."""
    HALF: tl.constexpr = ROW // 2
    return tl.where(columns < HALF, columns + HALF, columns - HALF), tl.where(columns < HALF, -1.0, 1.0)


@triton.jit(do_not_specialize=BATCH_SIZES)
def write_cache(
    query, key, value, cos, sin, turned_query, turned_key, key_cache, value_cache, slot_mapping, query_start, output,
    num_sequences, query_stride, key_stride, value_stride, angle_stride, key_block_stride, value_block_stride,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, PADDED_DK: tl.constexpr, PADDED_DV: tl.constexpr,
    PADDED_OUTPUT: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """One program per token: its keys and values go to its slot; the output of a token of no sequence becomes zero.

    With ROTARY, queries and keys are turned, and go to `turned_query [T, Hq, DK]` and `turned_key [T, Hkv, DK]`, too.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    block, within = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    columns = tl.arange(0, PADDED_DK)
    angle = token * angle_stride
    if ROTARY:
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < HEADS
        data = load_heads(
            query + token * query_stride, heads * DK, columns, inside, cos + angle, sin + angle, heads * 0,
            ROTARY, DK, PADDED_DK,
        )  # fmt: skip
        store_rows(turned_query + token * HEADS * DK, heads * DK, columns, data, inside, DK)
    heads = tl.arange(0, PADDED_KV_HEADS)
    inside = heads < KV_HEADS
    cached = inside & (slot >= 0)
    data = load_heads(
        key + token * key_stride, heads * DK, columns, inside, cos + angle, sin + angle, heads * 0,
        ROTARY, DK, PADDED_DK,
    )  # fmt: skip
    if ROTARY:
        store_rows(turned_key + token * KV_HEADS * DK, heads * DK, columns, data, inside, DK)
    target = key_cache + block * key_block_stride + within * DK
    store_rows(target, heads * BLOCK_SIZE * DK, columns, data, cached, DK)
    columns = tl.arange(0, PADDED_DV)
    data = load_rows(value + token * value_stride, heads * DV, columns, inside, DV, PADDED_DV, True)
    target = value_cache + block * value_block_stride + within * DV
    store_rows(target, heads * BLOCK_SIZE * DV, columns, data, cached, DV)
    if token >= tl.load(query_start + num_sequences):
        place = tl.arange(0, PADDED_OUTPUT)
        blank = tl.zeros([PADDED_OUTPUT], output.dtype.element_ty)
        tl.store(output + token * HEADS * DV + place, blank, place < HEADS * DV)


@triton.jit
def merge_splits(
    partial_sums, partial_stats, output, token, row, kv_head, splits, partial_rows,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One token of a kv head's group: output = Σ 2^(m_i − m)·sums_i / Σ 2^(m_i − m)·total_i over the splits i.

    PARTS of them at a time. Other programs wrote them a moment ago: they are read past the L1 cache.
    """
    group = tl.arange(0, PADDED_GROUPS)
    head = kv_head * GROUPS + group
    columns = tl.arange(0, PADDED_DV)
    sums = tl.zeros([PADDED_GROUPS, PADDED_DV], tl.float32)
    maximum = tl.full([PADDED_GROUPS], EMPTY, tl.float32)
    total = tl.zeros([PADDED_GROUPS], tl.float32)
    for first in range(0, splits, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < splits)[:, None] & (group < GROUPS)[None, :]
        place = (part.to(tl.int64)[:, None] * partial_rows + row) * HEADS + head[None, :]
        maxima = tl.load(partial_stats + place, inside, other=EMPTY, cache_modifier=".cg")
        totals_of = partial_stats + SPLITS * partial_rows.to(tl.int64) * HEADS
        totals = tl.load(totals_of + place, inside, other=0.0, cache_modifier=".cg")
        inside = inside[:, :, None] & (columns < DV)[None, None, :]
        places = place[:, :, None] * DV + columns[None, None, :]
        parts = tl.load(partial_sums + places, inside, other=0.0, cache_modifier=".cg")
        peak = tl.maximum(maximum, tl.max(maxima, 0))
        weights = tl.exp2(maxima - peak[None, :])
        decay = tl.exp2(maximum - peak)
        total = total * decay + tl.sum(totals * weights, 0)
        sums = sums * decay[:, None] + tl.sum(parts * weights[:, :, None], 0)
        maximum = peak
    result = (sums / total[:, None]).to(output.dtype.element_ty)
    store_rows(output, (token.to(tl.int64) * HEADS + head) * DV, columns, result, group < GROUPS, DV)


@triton.jit(do_not_specialize=BATCH_SIZES)
def attend_short(
    query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes,
    cos, sin, output, partial_sums, partial_stats, arrivals, num_sequences, partial_rows,
    query_stride, key_stride, value_stride, table_stride, key_block_stride, value_block_stride, angle_stride,
    scale, window, softcap,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_DK: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr, PARTS: tl.constexpr,
    DECODE: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """One program per kv head, sequence and split. The last split, which has the fewest keys, also takes the new ones.

    A sequence has as many splits as get SHARE blocks of keys each, but no more than SPLITS; the others' programs end at
    once. With one split the result goes to `output`. Otherwise the state of every row goes to `partial_sums
    [SPLITS, rows, Hq, DV]` and `partial_stats [2, SPLITS, rows, Hq]` (maximum, total), where a row is a token (DECODE)
    or sequence · BLOCK_Q + i; the last program to arrive, which `arrivals [S, Hkv]` tells, merges them and sets its
    counter back to zero. With ROTARY, queries and new keys are turned by the tables `cos` and `sin` `[T, DK]`.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUPS
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    wait(OVERLAP)
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    begin = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    context = tl.load(seq_lens + sequence) - (end - begin)

    rows = tl.arange(0, BLOCK_M)
    local_token = rows // GROUPS
    head = kv_head * GROUPS + rows % GROUPS
    key_columns = tl.arange(0, PADDED_DK)
    value_columns = tl.arange(0, PADDED_DV)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + head).to(tl.float32)
    keys = key_cache + kv_head * BLOCK_SIZE * DK
    values = value_cache + kv_head * BLOCK_SIZE * DV
    new_keys = key + kv_head * DK
    new_values = value + kv_head * DV + value_columns
    in_key, in_value = key_columns < DK, value_columns < DV
    table = block_tables + sequence.to(tl.int64) * table_stride
    num_owned = tl.load(query_start + num_sequences)
    stop = end
    if not DECODE and end - begin > BLOCK_Q:
        stop = begin
    splits = 1
    if SPLITS > 1:
        visible = context
        if HAS_WINDOW:
            visible = tl.minimum(context, window)
        splits = tl.minimum(tl.maximum(tl.cdiv(visible, SHARE * BLOCK_N), 1), SPLITS)
        if split >= splits:
            stop = begin

    for first in range(begin, stop, BLOCK_Q):
        token = (first + local_token).to(tl.int64)
        owned = (local_token < BLOCK_Q) & (token < end)
        positions = context + (first - begin) + local_token
        tile = load_heads(
            query, token * query_stride + head * DK, key_columns, owned, cos, sin, token * angle_stride,
            ROTARY, DK, PADDED_DK,
        )  # fmt: skip
        sums = tl.zeros([BLOCK_M, PADDED_DV], tl.float32)
        maximum = tl.full([BLOCK_M], EMPTY, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(context + (first - begin) - window + 1, 0)

        if HAS_SINKS and split == splits - 1:
            maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
            total += 1.0
        # Asked for before the cached keys and used after them, so that nobody waits.
        source = begin.to(tl.int64)
        new_key = load_head(
            new_keys + source * key_stride, key_columns, in_key, cos + source * angle_stride,
            sin + source * angle_stride, ROTARY, DK,
        )  # fmt: skip
        new_value = tl.load(new_values + source * value_stride, in_value, other=0.0)

        first_block = lowest // BLOCK_N
        blocks = tl.cdiv(context, BLOCK_N) - first_block
        share = tl.cdiv(blocks, splits)
        low = (first_block + split * share) * BLOCK_N
        high = tl.minimum(low + share * BLOCK_N, context)
        # Masked throughout: a second loop for the ragged end would pay for filling its pipeline again.
        sums, maximum, total = attend_tiles(
            sums, maximum, total, tile, positions, slopes, keys, values, table, key_block_stride, value_block_stride,
            None, None, 0, kv_head, low, high, lowest, high, scale, window, softcap,
            DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE,
            True, True, PRECISION, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip

        if split == splits - 1:
            for age in range(tl.minimum(first + BLOCK_Q, end) - begin):
                source = (begin + age).to(tl.int64)
                if DECODE:
                    slot = tl.load(slot_mapping + source).to(tl.int64)
                    block, within = slot // BLOCK_SIZE, slot % BLOCK_SIZE
                    tl.store(keys + block * key_block_stride + within * DK + key_columns, new_key, in_key & (slot >= 0))
                    place = values + block * value_block_stride + within * DV + value_columns
                    tl.store(place, new_value, in_value & (slot >= 0))
                sums, maximum, total = attend_one(
                    sums, maximum, total, tile, positions, slopes, new_key, new_value, context + age,
                    scale, window, softcap, HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
                )  # fmt: skip
                more = source + 1 < end
                following = source + 1
                new_key = load_head(
                    new_keys + following * key_stride, key_columns, in_key & more, cos + following * angle_stride,
                    sin + following * angle_stride, ROTARY, DK,
                )  # fmt: skip
                new_value = tl.load(new_values + following * value_stride, in_value & more, other=0.0)

        row = token
        if not DECODE:
            row = sequence.to(tl.int64) * BLOCK_Q + local_token
        if splits == 1:
            result = (sums / total[:, None]).to(output.dtype.element_ty)
            store_rows(output, (token * HEADS + head) * DV, value_columns, result, owned, DV)
        else:
            place = (split * partial_rows + row) * HEADS + head
            tl.store(partial_stats + place, maximum, owned)
            tl.store(partial_stats + SPLITS * partial_rows.to(tl.int64) * HEADS + place, total, owned)
            store_rows(partial_sums, place * DV, value_columns, sums, owned, DV)

    if SPLITS > 1 and (splits > 1) & (begin < stop):
        # All threads have stored before one of them counts the program as arrived.
        tl.debug_barrier()
        counter = arrivals + sequence * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            tl.store(counter, 0)
            first_row = begin
            if not DECODE:
                first_row = sequence * BLOCK_Q
            for member in range(stop - begin):
                merge_splits(
                    partial_sums, partial_stats, output, begin + member, first_row + member, kv_head, splits,
                    partial_rows, GROUPS, HEADS, DV, PADDED_DV, PADDED_GROUPS, SPLITS, PARTS,
                )  # fmt: skip

    # Row `sequence` belongs to nobody if the batch is padded: the padding's output is zero.
    if DECODE and (split == 0) & (sequence >= num_owned):
        blank = tl.zeros([BLOCK_M, PADDED_DV], output.dtype.element_ty)
        offsets = sequence.to(tl.int64) * HEADS * DV + head * DV
        store_rows(output, offsets, value_columns, blank, local_token == 0, DV)


@triton.jit(do_not_specialize=BATCH_SIZES)
def attend_long(
    query, key, value, key_tiles, value_tiles, key_cache, value_cache, block_tables, query_start, seq_lens,
    sinks, alibi_slopes, output, num_sequences,
    query_stride, key_stride, value_stride, table_stride, key_block_stride, value_block_stride,
    scale, window, softcap,
    GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PADDED_DK: tl.constexpr, PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED_SEQUENCES: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """One program per kv head and tile of BLOCK_Q tokens; others have the sequences of at most SHORT new tokens.

    `key_tiles` and `value_tiles`, if not None, are descriptors of the new keys and values `[T, Hkv·D]`.

    There are at most T // BLOCK_Q + S tiles. The grid has programs for the usual number; they take turns if need be.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUPS
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    kv_head = tl.program_id(0)
    candidates = tl.arange(0, PADDED_SEQUENCES)
    starts = tl.load(query_start + candidates, candidates < num_sequences, other=0)
    lengths = tl.load(query_start + candidates + 1, candidates < num_sequences, other=0) - starts
    tiles = tl.where(lengths > SHORT, tl.cdiv(lengths, BLOCK_Q), 0)
    tiles_until = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    for place in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        # The last tiles of a sequence see the most keys: they start first, so that none is left over at the end.
        tile_index = num_tiles - 1 - place
        before = tiles_until <= tile_index
        sequence = tl.sum(before.to(tl.int32), 0)
        first = (tile_index - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_Q
        begin = tl.load(query_start + sequence)
        end = tl.load(query_start + sequence + 1)
        context = tl.load(seq_lens + sequence) - (end - begin)
        rows = tl.arange(0, BLOCK_M)
        local_token = rows // GROUPS
        head = kv_head * GROUPS + rows % GROUPS
        token = (begin + first + local_token).to(tl.int64)
        owned = (local_token < BLOCK_Q) & (token < end)
        positions = context + first + local_token
        key_columns = tl.arange(0, PADDED_DK)
        value_columns = tl.arange(0, PADDED_DV)
        tile = load_rows(query, token * query_stride + head * DK, key_columns, owned, DK, PADDED_DK, True)
        slopes = tl.zeros([BLOCK_M], tl.float32)
        if HAS_ALIBI:
            slopes = tl.load(alibi_slopes + head).to(tl.float32)
        sums = tl.zeros([BLOCK_M, PADDED_DV], tl.float32)
        maximum = tl.full([BLOCK_M], EMPTY, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_SINKS:
            maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
            total += 1.0
        keys = key_cache + kv_head * BLOCK_SIZE * DK
        values = value_cache + kv_head * BLOCK_SIZE * DV
        table = block_tables + sequence.to(tl.int64) * table_stride
        lowest = 0
        lowest_new = 0
        if HAS_WINDOW:
            lowest = tl.maximum(context + first - window + 1, 0)
            lowest_new = tl.maximum(first - window + 1, 0)
        sums, maximum, total = attend_range(
            sums, maximum, total, tile, positions, slopes, keys, values, table, key_block_stride, value_block_stride,
            None, None, begin, kv_head,
            lowest // BLOCK_N * BLOCK_N, context, lowest, context + first, context + first + BLOCK_Q - 1,
            scale, window, softcap,
            DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE, True, PRECISION,
            HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip
        # The new tokens are read where the projections left them: side by side, without a table.
        keys = key + begin.to(tl.int64) * key_stride + kv_head * DK
        values = value + begin.to(tl.int64) * value_stride + kv_head * DV
        high = tl.minimum(first + BLOCK_Q, end - begin)
        sums, maximum, total = attend_range(
            sums, maximum, total, tile, first + local_token, slopes, keys, values, table, key_stride, value_stride,
            key_tiles, value_tiles, begin, kv_head,
            lowest_new // BLOCK_N * BLOCK_N, high, lowest_new, first, first + BLOCK_Q - 1, scale, window, softcap,
            DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE, False, PRECISION,
            HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip
        result = (sums / total[:, None]).to(output.dtype.element_ty)
        store_rows(output, (token * HEADS + head) * DV, value_columns, result, owned, DV)
