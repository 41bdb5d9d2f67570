"""`enginery::rotary_paged_attention` on NVIDIA GPUs.

In decoding the attention kernel turns queries and keys in its registers, on their way to the scores and to the cache.
Otherwise they are turned first, in a launch of their own: tiles of queries read the new keys again and again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from enginery.kernels.triton.paged_attention import is_decode, paged_attention, rows_of

HEADS_PER_PROGRAM = 8


@triton.jit
def rotate_heads(
    query, key, cos, sin, new_query, new_key, query_stride, key_stride, cos_stride, sin_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):  # fmt: skip
    """One program per token and block of heads, those of the keys behind those of the queries."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, PADDED_HALF)
    inside = columns < HALF
    queries = (heads < HEADS)[:, None] & inside[None, :]
    keys = ((heads >= HEADS) & (heads < HEADS + KV_HEADS))[:, None] & inside[None, :]
    place = heads[:, None] * 2 * HALF + columns[None, :]
    key_place = place - HEADS * 2 * HALF
    # Of the two masked loads one is zero everywhere.
    q, k = query + token * query_stride + place, key + token * key_stride + key_place
    first = tl.load(q, queries, other=0.0).to(tl.float32) + tl.load(k, keys, other=0.0).to(tl.float32)
    second = tl.load(q + HALF, queries, other=0.0).to(tl.float32) + tl.load(k + HALF, keys, other=0.0).to(tl.float32)
    angle, slope = cos + token * cos_stride + columns, sin + token * sin_stride + columns
    cos_first = tl.load(angle, inside, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(angle + HALF, inside, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(slope, inside, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(slope + HALF, inside, other=0.0).to(tl.float32)[None, :]
    new_first = (first * cos_first - second * sin_first).to(new_query.dtype.element_ty)
    new_second = (second * cos_second + first * sin_second).to(new_query.dtype.element_ty)
    new_q, new_k = new_query + token * HEADS * 2 * HALF + place, new_key + token * KV_HEADS * 2 * HALF + key_place
    tl.store(new_q, new_first, queries)
    tl.store(new_q + HALF, new_second, queries)
    tl.store(new_k, new_first, keys)
    tl.store(new_k + HALF, new_second, keys)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query `[T, Hq, D]` and key `[T, Hkv, D]` rotated by cos and sin `[T, D]`, as the reference's `rotate` does."""
    query, key = rows_of(query), rows_of(key)
    tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    new_query, new_key = query.new_empty(query.shape), key.new_empty(key.shape)
    if tokens > 0:
        rotate_heads[(tokens, triton.cdiv(heads + kv_heads, HEADS_PER_PROGRAM))](
            query, key, cos, sin, new_query, new_key, query.stride(0), key.stride(0), cos.stride(0), sin.stride(0),
            HEADS=heads, KV_HEADS=kv_heads, HALF=size // 2, BLOCK_HEADS=HEADS_PER_PROGRAM,
            PADDED_HALF=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return new_query, new_key


def rotary_paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    *rest: Any,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `enginery::rotary_paged_attention`, in 16 and 32 bits; `arrivals` as in `paged_attention`."""
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    batch = (key_cache, value_cache, slot_mapping, block_tables, *rest)
    if is_decode(query, block_tables) and cos.stride(0) == sin.stride(0):
        return paged_attention(query, key, value, *batch, angles=(cos, sin), arrivals=arrivals)
    return paged_attention(*rotate(query, key, cos, sin), value, *batch, arrivals=arrivals)
