"""Turns a schedule into the arrays of a step. Rows of running sequences are kept between steps, so a decode step costs
a few gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.runtime.edits import EditsBuilder, LogitsEdits
from enginery.runtime.request import Sequence
from enginery.runtime.sampling_params import BeamSearchParams
from enginery.runtime.scheduler import Scheduled

if TYPE_CHECKING:
    from torch import Tensor

_UNTIL_53_BITS = np.uint64(11)


@dataclass(slots=True)
class PromptRows:
    """Rows of logits that give the logprobs of prompt tokens `first_position + 1 ...` of a sequence."""

    sequence: Sequence
    first_row: int
    first_position: int
    count: int


@dataclass(slots=True)
class LogitsPlan:
    """Which logits a step computes and who reads them."""

    indices: np.ndarray
    """`[L]` int64, tokens of the step"""
    sequences: list[Sequence]
    """`[R]`, whose next token is sampled; a sequence about to be forked stands once for each completion"""
    rows: np.ndarray
    """`[R]` int64, rows of the logits"""
    choices: np.ndarray | None
    """`[R]` int64, the completion's index, where it is not the sequence's own"""
    prompts: list[PromptRows] = field(default_factory=list)


@dataclass(slots=True)
class SamplingInputs:
    """Parameters of R samples, one entry a row of `LogitsPlan.rows`."""

    rows: np.ndarray | None
    """`[R]` int64 rows of the logits; None: all, in order"""
    temperature: np.ndarray
    """`[R]` float32; 0: greedy"""
    top_k: np.ndarray
    """`[R]` int64; 0: all"""
    top_p: np.ndarray
    """`[R]` float64"""
    min_p: np.ndarray
    """`[R]` float64"""
    noise: np.ndarray
    """`[R]` float64, uniform in [0, 1)"""
    num_logprobs: np.ndarray
    """`[R]` int64; -1: none wanted"""
    edits: LogitsEdits | None
    pending: tuple[Tensor, np.ndarray] | None = None
    """Token ids `[P]` int64 of the last step, on the device of the logits, which the host does not know yet; and
    `[R]` int64: which of them is the newest token of each sample's sequence, -1: the host knows the newest."""


class Batch:
    """Tokens, block tables and sampling parameters of up to `max_num_seqs` running sequences, one row each.

    Memory: `max_num_seqs` × (`max_model_len` + `max_model_len` / `block_size`) int32, touched only as far as used.
    """

    def __init__(self, limits: EngineLimits) -> None:
        rows = limits.max_num_seqs
        self._block_size = limits.block_size
        self._tokens = np.zeros((rows, limits.max_model_len + 1), np.int32)
        self._block_tables = np.zeros((rows, limits.max_model_len // limits.block_size + 2), np.int32)
        self._owners: list[Sequence | None] = [None] * rows
        self._temperature = np.zeros(rows, np.float32)
        self._top_k = np.zeros(rows, np.int64)
        self._top_p = np.ones(rows, np.float64)
        self._min_p = np.zeros(rows, np.float64)
        self._seed = np.zeros(rows, np.uint64)
        self._choice = np.zeros(rows, np.int64)
        self._num_logprobs = np.full(rows, -1, np.int64)
        self._has_edits = np.zeros(rows, bool)

    # ---- inputs of the engine

    def inputs(self, items: list[Scheduled], sampled: Tensor | None = None) -> tuple[StepInputs, LogitsPlan]:
        """The step's arrays: T tokens of the scheduled sequences in order, and what its logits are for.

        `sampled`: `[P]`, what the last step sampled; sequences with a pending token have their place in it.
        """
        self._update_rows(items)
        rows = np.array([item.sequence.row for item in items], np.int64)
        starts = np.array([item.sequence.num_computed for item in items], np.int64)
        counts = np.array([item.num_tokens for item in items], np.int64)
        query_start = np.zeros(len(items) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        if num_tokens == len(items):
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, counts)
            positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], counts)
        seq_lens = (starts + counts).astype(np.int32)
        used_blocks = -(-int(seq_lens.max()) // self._block_size)
        blocks = self._block_tables[token_rows, positions // self._block_size].astype(np.int64)
        plan = _plan_logits(items, query_start)
        inputs = StepInputs(
            token_ids=self._tokens[token_rows, positions].astype(np.int64),
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            block_tables=self._block_tables[rows, :used_blocks],
            query_start=query_start,
            seq_lens=seq_lens,
            logits_indices=plan.indices,
            sampled=sampled,
            sources=None if sampled is None else _sources(items, query_start),
        )
        return inputs, plan

    def append(self, sequence: Sequence, token_id: int) -> None:
        """A running sequence got its next token, already the last of its `token_ids`."""
        if sequence.row >= 0 and self._owners[sequence.row] is sequence:
            self._tokens[sequence.row, len(sequence.token_ids) - 1] = token_id

    def _update_rows(self, items: list[Scheduled]) -> None:
        for sequence, _, first_changed, _ in items:
            blocks = sequence.blocks
            # A sequence that comes back may have grown while it was away, even if its row is the old one.
            if first_changed == 0 or self._owners[sequence.row] is not sequence:
                self._bind(sequence)
                first_changed = 0
            if first_changed < len(blocks):
                self._block_tables[sequence.row, first_changed : len(blocks)] = blocks[first_changed:]

    def _bind(self, sequence: Sequence) -> None:
        row = sequence.row
        request = sequence.request
        params = request.params
        self._owners[row] = sequence
        self._tokens[row, : len(sequence.token_ids)] = sequence.token_ids
        self._choice[row] = sequence.index
        self._seed[row] = request.seed
        if isinstance(params, BeamSearchParams):
            self._temperature[row] = 0.0
            self._num_logprobs[row] = request.num_beam_candidates
            self._has_edits[row] = False
        else:
            self._temperature[row] = params.temperature
            self._top_k[row] = max(0, params.top_k)
            self._top_p[row] = params.top_p
            self._min_p[row] = params.min_p
            self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
            self._has_edits[row] = request.has_edits

    # ---- inputs of the sampler

    def sampling_inputs(self, plan: LogitsPlan, pending: tuple[Tensor, np.ndarray] | None = None) -> SamplingInputs:
        """`pending`: see `SamplingInputs`; sequences with `num_pending` = 1 have their place in it."""
        rows = np.array([sequence.row for sequence in plan.sequences], np.int64)
        lengths = np.array([len(seq.token_ids) + seq.num_pending for seq in plan.sequences], np.uint64)
        temperature = self._temperature[rows]
        edits = EditsBuilder()
        for entry in np.flatnonzero(self._has_edits[rows]).tolist():
            edits.add(entry, plan.sequences[entry])
        is_identity = not plan.prompts and len(plan.rows) == len(plan.indices)
        return SamplingInputs(
            rows=None if is_identity else plan.rows,
            temperature=temperature,
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            noise=uniform_noise(
                self._seed[rows], self._choice[rows] if plan.choices is None else plan.choices, lengths
            ),
            num_logprobs=self._num_logprobs[rows],
            edits=edits.build(),
            pending=pending,
        )


def _sources(items: list[Scheduled], query_start: np.ndarray) -> np.ndarray:
    """`[T]` int64: a pending token, always the last of its sequence, by its place among the samples; else -1."""
    sources = np.full(query_start[-1], -1, np.int64)
    sources[query_start[1:] - 1] = places([item.sequence for item in items])
    return sources


def places(sequences: list[Sequence]) -> np.ndarray:
    """`[R]` int64: of pending tokens among the samples of the last step; -1: the host knows the sequence's newest."""
    return np.array([sequence.place if sequence.num_pending else -1 for sequence in sequences], np.int64)


def _plan_logits(items: list[Scheduled], query_start: np.ndarray) -> LogitsPlan:
    """Logits of the last known token of each sequence, and of whole prompts where their logprobs are wanted."""
    ends = query_start[1:].astype(np.int64)
    special = [i for i, item in enumerate(items) if _is_special(item)]
    if not special:
        return LogitsPlan(ends - 1, [item.sequence for item in items], np.arange(len(items)), None)
    plan = LogitsPlan(ends, [], ends, None)
    indices: list[int] = []
    rows: list[int] = []
    choices: list[int] = []
    for item, first, end in zip(items, query_start.tolist(), ends.tolist(), strict=False):
        sequence = item.sequence
        request = sequence.request
        is_complete = sequence.num_computed + item.num_tokens == sequence.num_tokens
        if request.wants_prompt_logprobs and sequence.is_prefilling:
            plan.prompts.append(PromptRows(sequence, len(indices), sequence.num_computed, item.num_tokens))
            indices.extend(range(first, end))
        elif is_complete:
            indices.append(end - 1)
        if is_complete:
            copies = range(request.num_choices) if sequence.is_prefilling else (sequence.index,)
            plan.sequences.extend([sequence] * len(copies))
            rows.extend([len(indices) - 1] * len(copies))
            choices.extend(copies)
    plan.indices = np.array(indices, np.int64)
    plan.rows = np.array(rows, np.int64)
    plan.choices = np.array(choices, np.int64)
    return plan


def _is_special(item: Scheduled) -> bool:
    """Whether a sequence gives other logits than one row for itself: an unfinished prompt, a fork, prompt logprobs."""
    sequence = item.sequence
    if sequence.num_computed + item.num_tokens < len(sequence.token_ids) + sequence.num_pending:
        return True
    request = sequence.request
    return sequence.is_prefilling and (request.num_choices > 1 or request.wants_prompt_logprobs)


def uniform_noise(seeds: np.ndarray, choices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), a function of (seed, choice, position) alone: SplitMix64's finaliser over a chain of the
    three."""
    with np.errstate(over="ignore"):
        state = _mix(_mix(_mix(seeds) + choices.astype(np.uint64)) + positions)
    return (state >> _UNTIL_53_BITS).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
