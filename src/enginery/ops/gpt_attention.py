"""Attention over one fused tensor of queries, keys and values: TensorRT-LLM 0.5's plugin, without its cache."""

from __future__ import annotations

import torch

from enginery.ops.attention import attention_reference
from enginery.ops.declare import declare


def gpt_attention_reference(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_scaling: float = 1.0,
    qkv_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """qkv `[..., T, (Hq + 2·Hkv)·D]` -> `[..., T, Hq·D]`: causal within each row, scale 1 / (q_scaling · √D)."""
    if qkv_bias is not None:
        qkv = qkv + qkv_bias
    scale = 1.0 / (q_scaling * head_size**0.5)
    sizes = [heads * head_size for heads in (num_heads, num_kv_heads, num_kv_heads)]
    rows = []
    for row in qkv.reshape(-1, *qkv.shape[-2:]):
        query, key, value = (part.unflatten(-1, (-1, head_size)) for part in row.split(sizes, dim=-1))
        rows.append(attention_reference(query, key, value, scale).flatten(-2))
    return torch.stack(rows).reshape(*qkv.shape[:-1], num_heads * head_size)


def _shape(qkv, num_heads, num_kv_heads, head_size, q_scaling=1.0, qkv_bias=None):
    return qkv.new_empty(*qkv.shape[:-1], num_heads * head_size)


GPT_ATTENTION = declare(
    "gpt_attention(Tensor qkv, int num_heads, int num_kv_heads, int head_size, float q_scaling=1.0, "
    "Tensor? qkv_bias=None) -> Tensor",
    reference=gpt_attention_reference,
    shape=_shape,
)
