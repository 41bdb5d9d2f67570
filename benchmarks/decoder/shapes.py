"""The shapes that are measured. Without torch."""

from __future__ import annotations

from typing import Any

FULL = "llama-8b"

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA_8B: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
"""The shape of Llama-3.1-8B."""

TINY: dict[str, Any] = {
    **_LLAMA,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}


def shape_name(tiny: bool, layers: int | None) -> str:
    """Goals and limits are those of `FULL`."""
    return ("tiny" if tiny else FULL) + (f", {layers} layers" if layers else "")
