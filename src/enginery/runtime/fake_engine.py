"""A deterministic engine without a model: it keeps token ids where an engine keeps keys and values.

Each step writes the new tokens to the slots it is given and reads every sequence's whole context back through the
block tables. The logits are a hash of that context, so a wrong slot, table, position, copy or reused block changes
what is generated; reading a slot that was never written, or that holds another position's token, raises.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.errors import StepError

POISON = -1
LogitsOf = Callable[[list[list[int]]], torch.Tensor]
"""Contexts to logits `[L, vocab_size]`, to play a real model."""


class FakeEngine:
    """Implements `Engine`. With `logits_of`, logits come from that function of the contexts instead of the hash."""

    def __init__(self, limits: EngineLimits, *, logits_of: LogitsOf | None = None) -> None:
        self._limits = limits
        self._logits_of = logits_of or self._hashed_logits
        self._tokens = np.full((limits.num_blocks, limits.block_size), POISON, np.int64)
        self._positions = np.full((limits.num_blocks, limits.block_size), POISON, np.int64)
        self.num_steps = 0
        self.num_copies = 0

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def is_asynchronous(self) -> bool:
        return False

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        inputs = inputs.resolved()
        self._check(inputs)
        self._tokens.reshape(-1)[inputs.slot_mapping] = inputs.token_ids
        self._positions.reshape(-1)[inputs.slot_mapping] = inputs.positions
        contexts = [self._context(inputs, sequence) for sequence in range(len(inputs.seq_lens))]
        self.num_steps += 1
        if not len(inputs.logits_indices):
            return torch.empty(0, self._limits.vocab_size)
        sequence_of = np.searchsorted(inputs.query_start, inputs.logits_indices, side="right") - 1
        wanted = zip(sequence_of.tolist(), inputs.positions[inputs.logits_indices].tolist(), strict=True)
        return self._logits_of([contexts[sequence][: position + 1] for sequence, position in wanted])

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self._tokens[destination] = self._tokens[source]
            self._positions[destination] = self._positions[source]
        self.num_copies += len(pairs)

    def poison(self, blocks: list[int]) -> None:
        """Makes the content of blocks unreadable."""
        self._tokens[blocks] = POISON
        self._positions[blocks] = POISON

    def close(self) -> None:
        pass

    def _check(self, inputs: StepInputs) -> None:
        limits = self._limits
        num_tokens = len(inputs.token_ids)
        if not 0 < num_tokens <= limits.max_num_tokens or len(inputs.seq_lens) > limits.max_num_seqs:
            raise StepError(f"{num_tokens} tokens of {len(inputs.seq_lens)} sequences are beyond the engine's limits")
        if len(np.unique(inputs.slot_mapping)) != num_tokens:
            raise StepError("two tokens of a step share a slot")
        if inputs.token_ids.min() < 0 or inputs.token_ids.max() >= limits.vocab_size:
            raise StepError("a token id is out of the vocabulary")
        if (np.diff(inputs.query_start) < 1).any() or inputs.query_start[-1] != num_tokens:
            raise StepError("query_start does not partition the tokens")

    def _context(self, inputs: StepInputs, sequence: int) -> list[int]:
        length = int(inputs.seq_lens[sequence])
        first, last = inputs.query_start[sequence], inputs.query_start[sequence + 1]
        if inputs.positions[last - 1] != length - 1 or inputs.positions[first] != length - (last - first):
            raise StepError(f"positions of sequence {sequence} do not end at its length {length}")
        used = -(-length // self._limits.block_size)
        blocks = inputs.block_tables[sequence, :used]
        if (self._positions[blocks].reshape(-1)[:length] != np.arange(length)).any():
            raise StepError(f"sequence {sequence} reads a slot that was not written for it")
        return self._tokens[blocks].reshape(-1)[:length].tolist()

    def _hashed_logits(self, contexts: list[list[int]]) -> torch.Tensor:
        logits = np.empty((len(contexts), self._limits.vocab_size), np.float32)
        for row, context in enumerate(contexts):
            digest = blake2b(np.array(context, np.int64).tobytes(), digest_size=8).digest()
            generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest)))
            generator.standard_normal(out=logits[row], dtype=np.float32)
        return torch.from_numpy(logits).mul_(2.0)
