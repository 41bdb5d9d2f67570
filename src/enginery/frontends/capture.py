"""What transformers calls in place of its own attention, masks and experts while a model is captured.

The functions are stateless; they are registered under one name, which a captured model's configuration selects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from enginery import ops
from enginery.errors import UnsupportedError

NAME = "enginery"


@dataclass(frozen=True)
class Mask:
    """Travels through the model in place of a mask tensor, to the attention that it is meant for."""

    causal: bool
    window: int | None
    chunk: int | None


def register() -> None:
    """Makes attn_implementation="enginery" and experts_implementation="enginery" known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def mask(*args: Any, mask_function: Any = None, local_size: int | None = None, **kwargs: Any) -> Mask:
    """The mask interface: says what the mask would be instead of building it."""
    names = _names_of(mask_function)
    chunked = any("chunked" in name for name in names)
    return Mask(
        causal=not any("bidirectional" in name for name in names),
        window=None if chunked else local_size,
        chunk=local_size if chunked else None,
    )


def _names_of(function: Any) -> list[str]:
    """Names of the functions that a mask function is composed of: transformers nests closures."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    inner = [item for cell in cells for item in (cell if isinstance(cell, tuple) else (cell,)) if callable(item)]
    return [getattr(function, "__qualname__", ""), *(name for item in inner for name in _names_of(item))]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention interface: query `[1, Hq, T, D]`, key and value `[1, Hkv, T, D]` -> `[1, T, Hq, Dv]`."""
    window = sliding_window
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, Mask):
        if attention_mask.chunk is not None:
            raise UnsupportedError(f"attention in chunks of {attention_mask.chunk} tokens is not supported")
        window = window or attention_mask.window
        causal = attention_mask.causal
    elif attention_mask is not None:
        raise UnsupportedError(f"{type(module).__name__} computes an attention mask of its own")
    if not causal:
        raise UnsupportedError(
            f"{type(module).__name__} attends in both directions; only causal decoders are supported"
        )
    result = ops.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        True,
        window,
        softcap,
        s_aux,
    )
    return result[None], None


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts interface: one row per token and chosen expert, through the expert's linears, summed by weight.

    hidden_states `[T, H]`, top_k_index and top_k_weights `[T, K]` -> `[T, H]`.
    """
    tokens, chosen = top_k_index.shape
    rows = hidden_states[:, None].expand(-1, chosen, -1).reshape(tokens * chosen, hidden_states.shape[-1])
    expert = top_k_index.reshape(-1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _expert_linear(module, first, rows, expert)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    hidden = _expert_linear(module, "down_proj", hidden, expert)
    if getattr(module, "has_post_expert_norm", False):
        hidden = module.post_expert_norm(hidden)
    weighted = hidden * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _expert_linear(module: Any, name: str, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return ops.expert_linear(rows, getattr(module, name), expert, bias, module.is_transposed)
