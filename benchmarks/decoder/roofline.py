"""The least time that a decoder can take, from the bytes it must read and the products it must compute.

    a step that decodes B sequences of n tokens   max(weights / read, flops · B / products) + B · n · KV bytes / read
    a prompt of n tokens                          n · flops / products, attention counted in
    a load of requests                            all its products / products + all its KV reads / read

Weights are those of the linear layers and of the head; the embedding is looked up, not read. A token's flops are two
for each of these weights, the head only where a token is sampled, and in attention, for n tokens before it,
4 · n · width of the queries (half of that on average over a prompt).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches. The defaults were measured on an H200 (SXM, 141 GB)."""

    read: float = 4.27e12
    """bytes/s of a reduction"""
    bf16: float = 700e12
    """flop/s of large matrix products"""
    fp8: float = 1400e12

    def updated(self, measured: Mapping[str, float]) -> Ceilings:
        """With those of the ceilings that were measured."""
        return replace(self, **{name: measured[name] for name in ("read", "bf16", "fp8") if name in measured})


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a Llama."""

    layers: int
    """weights of all linear layers"""
    head: int
    queries: int
    """width of the queries of all layers"""
    kv_bytes: int
    """of one token, 16-bit"""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        hidden, inner, count = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
        return cls(count * layer, hidden * config["vocab_size"], count * queries, count * 2 * keys * 2)


@dataclass(frozen=True)
class Roofline:
    shape: Shape
    ceilings: Ceilings
    fp8: bool = False
    """the linear layers, not the head, have 8-bit weights and products"""

    @property
    def weight_bytes(self) -> int:
        return self.shape.layers * (1 if self.fp8 else 2) + self.shape.head * 2

    def decode(self, batch: int, context: float) -> float:
        """Seconds of a step of `batch` sequences that hold `context` tokens each."""
        weights = max(self.weight_bytes / self.ceilings.read, self._products(batch, batch))
        return weights + batch * context * self.shape.kv_bytes / self.ceilings.read

    def prefill(self, length: int, batch: int = 1) -> float:
        """Seconds to the first tokens of `batch` prompts."""
        attention = 2 * length * self.shape.queries * length * batch
        return self._products(length * batch, batch) + attention / self.ceilings.bf16

    def load(self, requests: Iterable[tuple[int, int]]) -> float:
        """Seconds of requests of (input, output) tokens that all run at once."""
        total = 0.0
        for inputs, outputs in requests:
            total += self.prefill(inputs) + self._products(outputs - 1, outputs - 1)
            total += (outputs - 1) * (inputs + outputs / 2) * self.shape.kv_bytes / self.ceilings.read
        return total

    def _products(self, tokens: int, sampled: int) -> float:
        rate = self.ceilings.fp8 if self.fp8 else self.ceilings.bf16
        return 2 * self.shape.layers * tokens / rate + 2 * self.shape.head * sampled / self.ceilings.bf16
