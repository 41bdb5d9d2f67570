"""Tiny random checkpoints of many architectures, made with transformers, seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers as hf

VOCABULARY = 96
BASE = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
)
LLAMA = MappingProxyType({**BASE, "intermediate_size": 64, "num_key_value_heads": 2})
GPT2 = MappingProxyType({"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4})
EXPERTS = MappingProxyType({"num_experts": 4, "num_experts_per_tok": 2})
FALCON = MappingProxyType({**BASE, "alibi": False, "new_decoder_architecture": False, "multi_query": False})
SLIDING = 8
"""tokens of the window, shorter than the prompts"""

CONFIGS: Mapping[str, Callable[[], hf.PreTrainedConfig]] = MappingProxyType({
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "llama_tied": lambda: hf.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=SLIDING),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**LLAMA, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(
        **LLAMA, head_dim=16, sliding_window=SLIDING, query_pre_attn_scalar=24, attn_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **LLAMA, head_dim=16, sliding_window=SLIDING, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": lambda: hf.PhiConfig(**LLAMA),
    "phi3": lambda: hf.Phi3Config(**LLAMA, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**BASE, intermediate_size=64),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT2),
    "opt": lambda: hf.OPTConfig(**BASE, ffn_dim=64, word_embed_proj_dim=32),
    "starcoder2": lambda: hf.Starcoder2Config(**LLAMA, sliding_window=SLIDING),
    "stablelm": lambda: hf.StableLmConfig(**LLAMA, use_qkv_bias=True),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA),
    "cohere": lambda: hf.CohereConfig(**LLAMA, use_qk_norm=True),
    "granite": lambda: hf.GraniteConfig(
        **LLAMA, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=3.0
    ),
    "glm4": lambda: hf.Glm4Config(**LLAMA, head_dim=16, pad_token_id=0),
    "smollm3": lambda: hf.SmolLM3Config(**LLAMA, no_rope_layer_interval=2, pad_token_id=0),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **LLAMA, **EXPERTS, head_dim=16, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=SLIDING, pad_token_id=0
    ),
    "olmoe": lambda: hf.OlmoeConfig(**LLAMA, **EXPERTS),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **{**LLAMA, "num_key_value_heads": 4}, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=24, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, n_shared_experts=1,
    ),
    "minicpm3": lambda: hf.MiniCPM3Config(
        **{**LLAMA, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, scale_emb=2, dim_model_base=16, tie_word_embeddings=False,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=36, n_layer=2, n_head=6),
    "falcon": lambda: hf.FalconConfig(**{**FALCON, "new_decoder_architecture": True}, num_kv_heads=2),
    "falcon_multi_query": lambda: hf.FalconConfig(**{**FALCON, "multi_query": True}),
    "falcon_alibi": lambda: hf.FalconConfig(**{**FALCON, "alibi": True, "bias": True}),
    "gptj": lambda: hf.GPTJConfig(**GPT2, rotary_dim=4),
    "codegen": lambda: hf.CodeGenConfig(**GPT2, rotary_dim=4),
    "mpt": lambda: hf.MptConfig(vocab_size=VOCABULARY, d_model=36, n_layers=2, n_heads=6, max_seq_len=128),
})  # fmt: skip


def make_checkpoint(name: str, directory: Path, seed: int = 0) -> Path:
    """Writes the checkpoint. Weights are drawn so that attention and gates matter, and are exact in bfloat16."""
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_draw(key, parameter.shape, generator))
    model.save_pretrained(directory)
    return directory


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        value = noise * (1.0 if "embed" in name or "wte" in name else shape[-1] ** -0.5)
    elif "norm" in name or "ln_" in name:
        value = 0.1 * noise + ("bias" not in name)
    else:
        value = 0.3 * noise
    return value.bfloat16().float()


def load(directory: Path, dtype: torch.dtype, **options: Any) -> hf.PreTrainedModel:
    """transformers' own model."""
    model = hf.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
    model.generation_config.eos_token_id = None
    return model
