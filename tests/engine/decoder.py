"""A small decoder in plain torch, its network, and batches for its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from enginery import ops
from enginery.engine.manifest import Facts
from enginery.engine.protocol import StepInputs
from enginery.network import Network

VOCABULARY = 96
HIDDEN = 32
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LONGEST = 256


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    def __init__(self, window: int | None, hidden: int) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = RMSNorm(hidden), RMSNorm(hidden)
        self.q = nn.Linear(hidden, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(hidden, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(hidden, KV_HEADS * HEAD_DIM)
        self.o = nn.Linear(HEADS * HEAD_DIM, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 3 * hidden), nn.Linear(3 * hidden, hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        query = rotate(self.q(normed).view(-1, HEADS, HEAD_DIM), cos, sin)
        key = rotate(self.k(normed).view(-1, KV_HEADS, HEAD_DIM), cos, sin)
        value = self.v(normed).view(-1, KV_HEADS, HEAD_DIM)
        mixed = ops.attention(query, key, value, HEAD_DIM**-0.5, window=self.window)
        x = x + self.o(mixed.reshape(-1, HEADS * HEAD_DIM))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


class Decoder(nn.Module):
    """Rotary tables of the prologue and the hidden state cross the blocks. Every other block may have a window."""

    def __init__(self, layers: int = 3, window: int | None = None, hidden: int = HIDDEN, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(Block(window if i % 2 else None, hidden) for i in range(layers))
        self.norm = RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(token_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


@dataclass
class Imported:
    network: Network
    facts: Facts


def imported(model: Decoder) -> Imported:
    tokens = torch.export.Dim("tokens", min=1, max=1 << 20)
    examples = (torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    shapes = {"token_ids": {0: tokens}, "positions": {0: tokens}}
    network = Network.from_module(model.eval(), examples, dynamic_shapes=shapes)
    network.rename_output(network.output_names[0], "logits")
    facts = Facts(
        "Decoder", "decoder", VOCABULARY, LONGEST, len(model.layers), HIDDEN, HEADS, KV_HEADS, "float32", None, (1,)
    )
    return Imported(network, facts)


def reader(model: nn.Module):
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return lambda name: state[name].detach()


@dataclass
class Growing:
    """A sequence that grows: its tokens, its blocks, how many tokens the cache holds."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0


@dataclass
class Batcher:
    """Lays steps out as an engine wants them, and asks the model itself what the logits must be."""

    model: Decoder
    sequences: list[Growing] = field(default_factory=list)
    next_block: int = 0

    def add(self, tokens: Sequence[int]) -> Growing:
        # blocks in falling order: their numbers must not matter
        count = -(-LONGEST // 4 // 16)
        blocks = list(range(self.next_block + count - 1, self.next_block - 1, -1))
        self.next_block += count
        self.sequences.append(Growing(list(tokens), blocks))
        return self.sequences[-1]

    def step(self, parts: Sequence[tuple[Growing, int]]) -> tuple[StepInputs, torch.Tensor]:
        """`(sequence, number of new tokens)` pairs -> inputs, and the logits of each pair's last token."""
        ids, positions, slots, lengths, expected = [], [], [], [], []
        for sequence, count in parts:
            end = sequence.computed + count
            places = range(sequence.computed, end)
            ids += sequence.tokens[sequence.computed : end]
            positions += places
            slots += [sequence.blocks[p // 16] * 16 + p % 16 for p in places]
            lengths.append(end)
            sequence.computed = end
            with torch.no_grad():
                expected.append(self.model(torch.tensor(sequence.tokens[:end]), torch.arange(end))[-1])
        ends = np.cumsum([count for _, count in parts])
        inputs = StepInputs(
            token_ids=np.array(ids, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            slot_mapping=np.array(slots, dtype=np.int64),
            block_tables=np.array([sequence.blocks for sequence, _ in parts], dtype=np.int32),
            query_start=np.array([0, *ends], dtype=np.int32),
            seq_lens=np.array(lengths, dtype=np.int32),
            logits_indices=np.array(ends - 1, dtype=np.int64),
        )
        return inputs, torch.stack(expected)


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()
