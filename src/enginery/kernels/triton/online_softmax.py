"""The inner part of attention on a GPU: a tile of queries against keys, with a running softmax.

A tile holds BLOCK_M rows; row r is query head `r % GROUPS` of the kv head's group at token `r // GROUPS`, so that the
heads that share keys fill the rows of one matrix product (grouped heads packed). The state of a row is (sums, maximum,
total): Σ 2^(s − maximum)·v, the largest score so far in units of log2, and Σ 2^(s − maximum) (Milakov & Gimelshein,
"Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A finite stand-in for −inf: differences of two empty maxima stay 0 instead of NaN.
EMPTY = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(pointer, offsets, columns, inside, ROW: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of ROW elements at `pointer + offsets`, padded with zeros to PADDED columns; those not `inside` are zero."""
    pointers = pointer + offsets[:, None] + columns[None, :]
    if MASKED:
        if ROW == PADDED:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        return tl.load(pointers, mask=inside[:, None] & (columns < ROW)[None, :], other=0.0)
    if ROW == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < ROW)[None, :], other=0.0)


@triton.jit
def modify_scores(dots, scale, softcap, slopes, distance, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Scores from dot products, but for the factor of `exponent_scale`. distance = key position − query position."""
    scores = dots
    if HAS_SOFTCAP:
        # tanh(x) = 1 − 2 / (e^2x + 1)
        power = tl.exp2(dots * (2.0 * scale / softcap * LOG2_E))
        scores = softcap * (1.0 - 2.0 / (power + 1.0))
    elif HAS_ALIBI:
        scores = dots * scale
    if HAS_ALIBI:
        scores += slopes * distance
    return scores


@triton.jit
def exponent_scale(scale, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """What turns the scores of `modify_scores` into exponents of 2; the plain case gets by with one multiplication."""
    if HAS_SOFTCAP or HAS_ALIBI:
        return LOG2_E
    return scale * LOG2_E


@triton.jit
def attend_tiles(
    sums, maximum, total, query, positions, slopes,
    keys, values, table, key_stride, value_stride, key_tiles, value_tiles, origin, kv_head,
    start, stop, lowest, highest,
    scale, window, softcap,
    DK: tl.constexpr, DV: tl.constexpr, PADDED_DK: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Takes the keys start..stop, BLOCK_N at a time, into the tile's state; `positions` count from the same origin.

    PAGED: `keys` and `values` point at this kv head's rows of block 0 and the strides are between blocks; otherwise the
    keys lie one after another with a stride each, and `key_tiles` and `value_tiles` may be descriptors, of the same in
    the rows from `origin` on of `[T, Hkv·D]`, else None.

    With MASKED, only keys in [lowest, highest) are read (what lies beyond may be anything, NaN too) and each row sees
    those at or before its position and inside its window. Without, every key of the range must be visible to every row.
    """
    factor = exponent_scale(scale, HAS_SOFTCAP, HAS_ALIBI)
    key_columns = tl.arange(0, PADDED_DK)
    value_columns = tl.arange(0, PADDED_DV)
    for first in tl.range(start, stop, BLOCK_N):
        offsets = first + tl.arange(0, BLOCK_N)
        inside = (offsets >= lowest) & (offsets < highest)
        if PAGED:
            if BLOCK_N == BLOCK_SIZE:
                # One page: a scalar names it, and all addresses follow.
                blocks = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
            elif MASKED:
                blocks = tl.load(table + offsets // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            else:
                blocks = tl.load(table + offsets // BLOCK_SIZE).to(tl.int64)
            key_rows = blocks * key_stride + offsets % BLOCK_SIZE * DK
            value_rows = blocks * value_stride + offsets % BLOCK_SIZE * DV
        else:
            key_rows = offsets.to(tl.int64) * key_stride
            value_rows = offsets.to(tl.int64) * value_stride
        if key_tiles is not None and not MASKED:
            key = key_tiles.load([origin + first, kv_head * DK])
        else:
            key = load_rows(keys, key_rows, key_columns, inside, DK, PADDED_DK, MASKED)
        dots = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        distance = offsets[None, :] - positions[:, None]
        scores = modify_scores(dots, scale, softcap, slopes[:, None], distance, HAS_SOFTCAP, HAS_ALIBI)
        if MASKED:
            visible = inside[None, :] & (distance <= 0)
            if HAS_WINDOW:
                visible = visible & (distance > -window)
            scores = tl.where(visible, scores, -float("inf"))
        peak = tl.maximum(maximum, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - peak[:, None])
        decay = tl.exp2(maximum - peak)
        total = total * decay + tl.sum(weights, 1)
        maximum = peak
        if value_tiles is not None and not MASKED:
            value = value_tiles.load([origin + first, kv_head * DV])
        else:
            value = load_rows(values, value_rows, value_columns, inside, DV, PADDED_DV, MASKED)
        sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision=PRECISION)
    return sums, maximum, total


@triton.jit
def attend_range(
    sums, maximum, total, query, positions, slopes,
    keys, values, table, key_stride, value_stride, key_tiles, value_tiles, origin, kv_head,
    low, high, lowest, first_position, last_position,
    scale, window, softcap,
    DK: tl.constexpr, DV: tl.constexpr, PADDED_DK: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """`attend_tiles` over [low, high), low a multiple of BLOCK_N, with masks only at the edges that need them.

    The tile's rows stand at first_position..last_position; none of them sees a key before `lowest`.
    """
    clear_low = low
    clear_high = tl.maximum(tl.minimum(high, first_position + 1) // BLOCK_N * BLOCK_N, low)
    if HAS_WINDOW:
        edge = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N
        clear_low = tl.minimum(tl.maximum(low, edge), clear_high)
        sums, maximum, total = attend_tiles(
            sums, maximum, total, query, positions, slopes, keys, values, table, key_stride, value_stride,
            key_tiles, value_tiles, origin, kv_head, low, clear_low, lowest, high, scale, window, softcap,
            DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE, PAGED, True, PRECISION,
            HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip
    sums, maximum, total = attend_tiles(
        sums, maximum, total, query, positions, slopes, keys, values, table, key_stride, value_stride,
        key_tiles, value_tiles, origin, kv_head, clear_low, clear_high, lowest, high, scale, window, softcap,
        DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE, PAGED, False, PRECISION,
        HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
    )  # fmt: skip
    return attend_tiles(
        sums, maximum, total, query, positions, slopes, keys, values, table, key_stride, value_stride,
        key_tiles, value_tiles, origin, kv_head, clear_high, high, lowest, high, scale, window, softcap,
        DK, DV, PADDED_DK, PADDED_DV, BLOCK_N, BLOCK_SIZE, PAGED, True, PRECISION,
        HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
    )  # fmt: skip


@triton.jit
def attend_one(
    sums, maximum, total, query, positions, slopes, key, value, position,
    scale, window, softcap,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Takes one key `[PADDED_DK]` and its value `[PADDED_DV]` into the state of the tile, straight from registers."""
    factor = exponent_scale(scale, HAS_SOFTCAP, HAS_ALIBI)
    dots = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    distance = position - positions
    scores = modify_scores(dots, scale, softcap, slopes, distance, HAS_SOFTCAP, HAS_ALIBI)
    visible = distance <= 0
    if HAS_WINDOW:
        visible = visible & (distance > -window)
    scores = tl.where(visible, scores, -float("inf"))
    peak = tl.maximum(maximum, scores * factor)
    weights = tl.exp2(scores * factor - peak)
    decay = tl.exp2(maximum - peak)
    total = total * decay + weights
    sums = sums * decay[:, None] + weights[:, None] * value.to(tl.float32)[None, :]
    return sums, peak, total
