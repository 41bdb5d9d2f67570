"""The seam between the runtime and the device: all that a session knows of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineLimits:
    """What an engine can hold. All counts are of tokens, sequences or KV blocks."""

    vocab_size: int
    max_model_len: int
    max_num_tokens: int
    """New tokens of one step, over all sequences."""
    max_num_seqs: int
    num_blocks: int
    block_size: int = 16
    step_sizes: tuple[int, ...] = ()
    """Numbers of tokens, rising, that a step of prompts beside many other sequences is padded to; empty: none."""


Progress = Callable[[str, int, int], None]
"""stage, done, total (0: unknown)"""

NETWORK_INPUTS = (
    "token_ids", "positions", "slot_mapping", "block_tables", "query_start", "seq_lens", "logits_indices",
)  # fmt: skip
"""The arrays of `StepInputs` that a network may read."""


@dataclass(frozen=True)
class StepInputs:
    """The batch of one step, laid out as `enginery::paged_attention` wants it. T tokens of S sequences, L rows of
    logits."""

    token_ids: np.ndarray
    """`[T]` int64"""
    positions: np.ndarray
    """`[T]` int64, the place of each token in its sequence, from 0"""
    slot_mapping: np.ndarray
    """`[T]` int64, block · block_size + offset"""
    block_tables: np.ndarray
    """`[S, B]` int32, padded with 0"""
    query_start: np.ndarray
    """`[S + 1]` int32, sequence s owns tokens query_start[s]:query_start[s + 1]"""
    seq_lens: np.ndarray
    """`[S]` int32, length of each sequence, the new tokens counted in"""
    logits_indices: np.ndarray
    """`[L]` int64, the tokens whose logits are wanted; L is 0 in a step of unfinished prompts"""
    sampled: torch.Tensor | None = None
    """`[P]` int64 on the engine's device: what the step before sampled, where the host may not know it yet"""
    sources: np.ndarray | None = None
    """`[T]` int64, the place in `sampled` of a token that the host does not know, -1 of one that is in `token_ids`;
    given together with `sampled`"""

    def resolved(self) -> StepInputs:
        """With every token in `token_ids`: for engines on the host. Waits for the step before."""
        if self.sampled is None or self.sources is None:
            return self
        known = np.where(self.sources < 0, self.token_ids, self.sampled.cpu().numpy()[self.sources])
        return replace(self, token_ids=known, sampled=None, sources=None)


class Engine(Protocol):
    """Runs steps. One thread at a time."""

    @property
    def limits(self) -> EngineLimits: ...

    @property
    def is_asynchronous(self) -> bool:
        """`execute` returns before the step has run; its result is valid in the order of the current CUDA stream."""
        ...

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        """Writes the new tokens' keys and values to the cache and returns logits `[L, vocab_size]`, in the dtype of
        the model, on its device.

        The tensor is valid until the next call, and the caller may write to it until then. Executing the same inputs
        again gives the same result: a session does so to find out which sequence of a failed step was at fault.
        """
        ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies KV blocks `(source, destination)` in all layers, before the next step."""
        ...

    def close(self) -> None: ...
