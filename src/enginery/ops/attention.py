"""Attention over one packed sequence: what the frontends emit, before there is a cache."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Masked scores `[Hq, T, S]`, float32 or float64 as the inputs; `positions[t]` is query t's place among the keys.

    s = scale·q·k;  s = c·tanh(s / c) with a soft cap;  s += slope·(j − i) with ALiBi;
    s = −inf for j > i, and for j ≤ i − window.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    keys = key.to(wide).repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,shd->hts", query.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(key.shape[0], device=key.device)[None, :] - positions[:, None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(wide)[:, None, None] * distance
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(distance <= -window, -torch.inf)
    return scores


def attend(scores: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """softmax(scores [Hq, T, S])·value [S, Hkv, Dv] -> [T, Hq, Dv]. A sink is one more logit, without a value."""
    groups = scores.shape[0] // value.shape[1]
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    values = value.to(scores.dtype).repeat_interleave(groups, dim=1)
    return torch.einsum("hts,shd->thd", weights, values).to(value.dtype)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """query `[T, Hq, Dk]`, key `[T, Hkv, Dk]`, value `[T, Hkv, Dv]` -> `[T, Hq, Dv]`; Hq is a multiple of Hkv."""
    positions = torch.arange(query.shape[0], device=query.device)
    scores = attention_scores(query, key, positions, scale, causal, window, softcap, alibi_slopes)
    return attend(scores, value, sinks)


def _shape(query, key, value, scale, causal=True, window=None, softcap=None, sinks=None, alibi_slopes=None):
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


ATTENTION = declare(
    "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal=True, int? window=None, "
    "float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None) -> Tensor",
    reference=attention_reference,
    shape=_shape,
)
