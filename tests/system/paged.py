"""Drives a rewritten network by the reference interpreter: a KV pool, block tables and steps, without an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from enginery.checkpoint import Checkpoint
from enginery.network import Network, Program

BLOCK = 16
POOL = 24
"""blocks of the pool; filled with NaN, so that reading what was never written shows"""


@dataclass
class Sequence:
    blocks: list[int]
    length: int = 0


@dataclass
class PagedDriver:
    network: Network
    checkpoint: Checkpoint
    sequences: dict[str, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network = self.network
        self.free = torch.randperm(POOL, generator=torch.Generator().manual_seed(1)).tolist()
        self.pools = {
            tensor.name: torch.full([POOL, *tensor.shape[1:]], torch.nan, dtype=tensor.dtype)
            for tensor in network.inputs
            if "_cache." in tensor.name
        }
        folded = [layer for layer in network if layer.is_constant]
        live = [layer for layer in network if not layer.is_constant]
        weights = [self._weight(tensor.name, tensor.dtype) for tensor in network.constants]
        edges = {t: None for layer in live for t in layer.inputs if t.is_constant}
        bound = Program(folded, network.constants, list(edges))(weights)
        self.constants = bound
        self.program = Program(live, [*network.inputs, *edges], network.outputs)

    def _weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        value = self.network.values.get(name)
        return self.checkpoint.read(name).to(dtype) if value is None else value

    def step(self, batch: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Runs new tokens of several sequences in one step; logits of every token, by sequence."""
        counts = [len(tokens) for tokens in batch.values()]
        return dict(zip(batch, self.logits(batch, torch.arange(sum(counts))).split(counts), strict=True))

    def logits(self, batch: dict[str, list[int]], indices: torch.Tensor) -> torch.Tensor:
        """Runs new tokens of several sequences in one step; logits of the tokens at these places of the step."""
        positions, slots, lengths, starts, tables = [], [], [], [0], []
        for name, tokens in batch.items():
            sequence = self.sequences.setdefault(name, Sequence([]))
            for _ in tokens:
                place = sequence.length
                if place % BLOCK == 0:
                    sequence.blocks.append(self.free.pop())
                positions.append(place)
                slots.append(sequence.blocks[-1] * BLOCK + place % BLOCK)
                sequence.length += 1
            lengths.append(sequence.length)
            starts.append(starts[-1] + len(tokens))
            tables.append(sequence.blocks)
        width = max(map(len, tables))
        values = {
            "token_ids": torch.tensor([token for tokens in batch.values() for token in tokens]),
            "positions": torch.tensor(positions),
            "slot_mapping": torch.tensor(slots),
            "block_tables": torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
            "query_start": torch.tensor(starts, dtype=torch.int32),
            "seq_lens": torch.tensor(lengths, dtype=torch.int32),
            "logits_indices": indices,
            **self.pools,
        }
        (logits,) = self.program([*(values[tensor.name] for tensor in self.network.inputs), *self.constants])
        return logits
