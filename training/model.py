"""The decoder as it is trained: transformers' LlamaForCausalLM in the fewest operations, same parameter names.

`state_dict()` loads into `LlamaForCausalLM(config)` unchanged; `tests/models` holds the two against each other. It
exists because training wants bfloat16 residuals over float32 weights, and each layer compiled once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig


def llama_config(vocabulary: int, end: int, turn_end: int) -> LlamaConfig:
    """5.8 million parameters, the tied embedding included. Widths divide by 128, for group-wise quantisation."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        pad_token_id=end,
        eos_token_id=turn_end,
        dtype="bfloat16",
    )


class Linear(nn.Linear):
    """Float32 weights, used in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """x / rms(x) · weight, in float32."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (batch, heads, length, head_dim): the halves of a head are the two coordinates."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=False)
        self.k_proj = Linear(config.hidden_size, width // self.groups, bias=False)
        self.v_proj = Linear(config.hidden_size, width // self.groups, bias=False)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Hidden states of (batch, length) token ids, before the tied head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        half = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.arange(config.max_position_embeddings)[:, None] * config.rope_parameters["rope_theta"] ** -half
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = self.embed_tokens(tokens).to(dtype)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.model = Decoder(config)
        self.loss = weighted_loss
        depth_scale = (2 * config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(
                    parameter, std=0.04 * (depth_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
                )

    def forward(self, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean cross-entropy of the targets, each counted by its weight. All three (batch, length)."""
        return self.loss(self.model(tokens), self.model.embed_tokens.weight, targets, weights)


def weighted_loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ w·(-log p(target)) / Σ w with logits = hidden · headᵀ."""
    logits = F.linear(hidden, head.to(hidden.dtype)).flatten(0, 1).float()
    return (F.cross_entropy(logits, targets.flatten(), reduction="none") * weights.flatten()).sum() / weights.sum()
