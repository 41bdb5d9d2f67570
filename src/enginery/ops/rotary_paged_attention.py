"""Rotary embedding (Su et al., 2021) of queries and keys, write to the KV cache and paged attention, as one operator.

Where the rotated keys go is the kernel's business: straight to the cache, if it can.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.ops.declare import declare
from enginery.ops.paged_attention import PAGED_ATTENTION
from enginery.ops.precision import widened


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x `[T, H, D]`, cos and sin `[T, D]` -> x·cos + turn(x)·sin with turn(first half, second) = (−second, first).

    In float32 (float64 for float64), rounded once.
    """
    rows = widened(x)
    first, second = rows.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (rows * cos.to(rows.dtype)[:, None] + turned * sin.to(rows.dtype)[:, None]).to(x.dtype)


def rotary_paged_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """As `paged_attention`, of the rotated query and key: cos and sin `[T, Dk]` are those of the tokens' positions."""
    return PAGED_ATTENTION.overload(rotate(query, cos, sin), rotate(key, cos, sin), value, *rest)


ROTARY_PAGED_ATTENTION = declare(
    "rotary_paged_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor seq_lens, "
    "float scale, int? window=None, float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    reference=rotary_paged_attention_reference,
    shape=PAGED_ATTENTION.shape,
)
