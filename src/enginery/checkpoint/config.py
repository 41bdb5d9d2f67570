"""Sanity of `config.json`: what would make an import allocate, loop or divide absurdly is refused by key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginery.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Bound:
    """An integer that may go by several names, and the range that any real model keeps to."""

    names: tuple[str, ...]
    low: int
    high: int


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk")

BOUNDS = (
    Bound(("vocab_size",), 1, 1 << 24),
    Bound(LAYERS, 1, 4096),
    Bound(HIDDEN, 1, 1 << 20),
    Bound(HEADS, 1, 1 << 14),
    Bound(KV_HEADS, 1, 1 << 14),
    Bound(("head_dim",), 1, 1 << 14),
    Bound(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"), 1, 1 << 24),
    Bound(POSITIONS, 1, 1 << 31),
    Bound(EXPERTS, 0, 1 << 16),
    Bound(ACTIVE_EXPERTS, 0, 1 << 16),
    Bound(("sliding_window",), 0, 1 << 31),
    Bound(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 1, 1 << 20),
)
POSITIVE = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "factor", "original_max_position_embeddings")
"""numbers above zero, in the configuration or its rope tables"""
NON_NEGATIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
ROPE_TABLES = ("rope_parameters", "rope_scaling")


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the text decoder: `text_config` of a multimodal checkpoint, else all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError naming key and value, or UnsupportedError naming the quantisation method."""
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{source}: model_type is {config.get('model_type')!r}, not a name",
            "Is this a Hugging Face model directory?",
        )
    architectures = config.get("architectures")
    if architectures is not None and not _are(architectures, str):
        raise CheckpointError(f"{source}: architectures is {_show(architectures)}, not a list of names")
    _refuse_quantised(config, source)
    decoder = decoder_config(config)
    for bound in BOUNDS:
        for name in bound.names:
            _check_bound(decoder, name, bound, source)
    for table in (decoder, *(decoder.get(name) for name in ROPE_TABLES)):
        _check_numbers(table, source)
    _check_relations(decoder, source)


def first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first name that is set."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def _refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    quantisation = config.get("quantization_config") or decoder_config(config).get("quantization_config")
    if not quantisation:
        quantisation = config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise UnsupportedError(
            f"{source}: weights quantised by {str(method or 'an unnamed method')[:40]!r} cannot be read yet",
            "Use the model's unquantised checkpoint",
        )


def _check_bound(config: Mapping[str, Any], name: str, bound: Bound, source: str) -> None:
    value = config.get(name)
    if value is None:
        return
    if type(value) is list and _are(value, int):
        low, high = min(value, default=bound.low), max(value, default=bound.low)
    elif type(value) is int:
        low = high = value
    else:
        raise CheckpointError(f"{source}: {name} is {_show(value)}, not an integer")
    if low < bound.low or high > bound.high:
        raise CheckpointError(f"{source}: {name} is {_show(value)}, outside {bound.low}..{bound.high}")


def _check_numbers(table: Any, source: str) -> None:
    if not isinstance(table, Mapping):
        return
    for name, low_is_fine in [*((name, False) for name in POSITIVE), *((name, True) for name in NON_NEGATIVE)]:
        value = table.get(name)
        if value is None or name in ROPE_TABLES:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not low_is_fine):
            raise CheckpointError(
                f"{source}: {name} is {_show(value)}, not a {'non-negative' if low_is_fine else 'positive'} number"
            )
    for nested in table.values():
        if isinstance(nested, dict) and any(name in nested for name in POSITIVE):
            _check_numbers(nested, source)


def _check_relations(config: Mapping[str, Any], source: str) -> None:
    hidden, heads, kv_heads = first(config, HIDDEN), first(config, HEADS), first(config, KV_HEADS)
    # a separate head size, or latent attention, frees the hidden size from the number of heads
    free = config.get("head_dim") is not None or config.get("kv_lora_rank") is not None
    if type(hidden) is int and type(heads) is int and hidden % heads and not free:
        raise CheckpointError(f"{source}: hidden size {hidden} is not divisible by {heads} attention heads")
    if type(heads) is int and type(kv_heads) is int and heads % kv_heads:
        raise CheckpointError(f"{source}: {heads} attention heads are not divisible by {kv_heads} key-value heads")
    experts, active = first(config, EXPERTS), first(config, ACTIVE_EXPERTS)
    if type(experts) is int and type(active) is int and experts and active > experts:
        raise CheckpointError(f"{source}: {active} experts per token of only {experts}")
    layers, kinds = first(config, LAYERS), config.get("layer_types")
    if kinds is not None and (not _are(kinds, str) or (type(layers) is int and len(kinds) != layers)):
        raise CheckpointError(f"{source}: layer_types is {_show(kinds)}, which does not describe {layers} layers")


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
