"""Attention of a batch of sequences over a paged KV cache (Kwon et al., SOSP 2023): `attention` in an engine."""

from __future__ import annotations

import torch

from enginery.ops.attention import attend, attention_scores
from enginery.ops.declare import declare


def paged_attention_reference(
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
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes key and value to their slots, then attends causally over each sequence's blocks.

    query `[T, Hq, Dk]`, key `[T, Hkv, Dk]`, value `[T, Hkv, Dv]`: the new tokens of S sequences, one after another.
    key_cache `[blocks, Hkv, block_size, Dk]`, value_cache `[blocks, Hkv, block_size, Dv]`: the layer's pool.
    slot_mapping `[T]` int64: block · block_size + offset of each token; −1: padding, nothing is written.
    block_tables `[S, B]` int32; query_start `[S + 1]` int32: sequence s owns tokens query_start[s]:query_start[s + 1];
    seq_lens `[S]` int32: length of each sequence, the new tokens counted in. Returns `[T, Hq, Dv]`; rows of no
    sequence are zero.
    """
    block_size = key_cache.shape[2]
    real = slot_mapping >= 0
    blocks, offsets = slot_mapping[real] // block_size, slot_mapping[real] % block_size
    key_cache[blocks, :, offsets] = key[real]
    value_cache[blocks, :, offsets] = value[real]
    output = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    for sequence, length in enumerate(seq_lens.tolist()):
        begin, end = query_start[sequence : sequence + 2].tolist()
        if begin == end:
            continue
        table = block_tables[sequence, : -(-length // block_size)].long()
        keys = key_cache[table].transpose(1, 2).flatten(0, 1)[:length]
        values = value_cache[table].transpose(1, 2).flatten(0, 1)[:length]
        positions = torch.arange(length - (end - begin), length, device=query.device)
        scores = attention_scores(query[begin:end], keys, positions, scale, True, window, softcap, alibi_slopes)
        output[begin:end] = attend(scores, values, sinks)
    return output


def _shape(query, key, value, *rest, **named):
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


PAGED_ATTENTION = declare(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, Tensor block_tables, Tensor query_start, Tensor seq_lens, float scale, int? window=None, "
    "float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    reference=paged_attention_reference,
    shape=_shape,
)
