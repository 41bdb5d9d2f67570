"""Turns a schedule into the arrays of a step. Block tables and sampling parameters of running sequences are kept
between steps, so a decode step costs a few gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.runtime.edits import EditsBuilder, LogitsEdits
from enginery.runtime.request import Sequence
from enginery.runtime.sampling_params import BeamSearchParams
from enginery.runtime.scheduler import Schedule

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
    choices: np.ndarray | None = None
    """`[R]` int64, the completion's index, where it is not the sequence's own"""
    prompts: list[PromptRows] = field(default_factory=list)
    branches: bool = False
    """Which sequences go on is not known before the tokens are: some sequence forks, or is a beam."""


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
    """Block tables and sampling parameters of up to `max_num_seqs` running sequences, one row each.

    Memory: `max_num_seqs` × `max_model_len` / `block_size` int32, touched only as far as used.
    """

    def __init__(self, limits: EngineLimits) -> None:
        rows = limits.max_num_seqs
        self._block_size = limits.block_size
        self._block_tables = np.zeros((rows, limits.max_model_len // limits.block_size + 2), np.int32)
        self._temperature = np.zeros(rows, np.float32)
        self._top_k = np.zeros(rows, np.int64)
        self._top_p = np.ones(rows, np.float64)
        self._min_p = np.zeros(rows, np.float64)
        self._seed = np.zeros(rows, np.uint64)
        self._choice = np.zeros(rows, np.int64)
        self._num_logprobs = np.full(rows, -1, np.int64)
        self._has_edits = np.zeros(rows, bool)

    # ---- inputs of the engine

    def inputs(self, schedule: Schedule, sampled: Tensor | None = None) -> tuple[StepInputs, LogitsPlan]:
        """The step's arrays: T tokens of the scheduled sequences in order, and what its logits are for.

        `sampled`: `[P]`, what the last step sampled; sequences with a pending token have their place in it.
        """
        for sequence, first, _ in schedule.changes:
            self._update_row(sequence, first)
        sequences = schedule.sequences
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        starts = np.array([sequence.num_computed for sequence in sequences], np.int64)
        if schedule.num_tokens == len(sequences):
            query_start = np.arange(len(sequences) + 1, dtype=np.int32)
            lengths = starts + 1
            token_rows, positions = rows, starts
        else:
            counts = np.array(schedule.num_new, np.int64)
            query_start = np.zeros(len(sequences) + 1, np.int32)
            np.cumsum(counts, out=query_start[1:])
            lengths = starts + counts
            token_rows = np.repeat(rows, counts)
            positions = np.arange(schedule.num_tokens) + np.repeat(starts - query_start[:-1], counts)
        used_blocks = -(-int(lengths.max()) // self._block_size)
        blocks = self._block_tables[token_rows, positions // self._block_size].astype(np.int64)
        plan = _plan_logits(schedule, query_start)
        inputs = StepInputs(
            token_ids=np.array(_token_ids(schedule), np.int64),
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            block_tables=self._block_tables[rows, :used_blocks],
            query_start=query_start,
            seq_lens=lengths.astype(np.int32),
            logits_indices=plan.indices,
            sampled=sampled,
            sources=None if sampled is None else _sources(sequences, query_start),
        )
        return inputs, plan

    def _update_row(self, sequence: Sequence, first_changed: int) -> None:
        if first_changed == 0:
            self._bind(sequence)
        table = self._block_tables[sequence.row]
        for index, block in enumerate(sequence.blocks[first_changed:], first_changed):
            table[index] = block

    def _bind(self, sequence: Sequence) -> None:
        row = sequence.row
        request = sequence.request
        params = request.params
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

    def sampling_inputs(self, inputs: StepInputs, plan: LogitsPlan) -> SamplingInputs:
        rows = np.array([sequence.row for sequence in plan.sequences], np.int64)
        newest = plan.indices[plan.rows]
        temperature = self._temperature[rows]
        choices = self._choice[rows] if plan.choices is None else plan.choices
        noise = np.zeros(len(rows))
        if temperature.any():
            noise = uniform_noise(self._seed[rows], choices, inputs.positions[newest] + 1)
        pending = None
        if inputs.sampled is not None and inputs.sources is not None:
            pending = (inputs.sampled, inputs.sources[newest])
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
            noise=noise,
            num_logprobs=self._num_logprobs[rows],
            edits=edits.build(),
            pending=pending,
        )


def _token_ids(schedule: Schedule) -> list[int]:
    """`[T]`; 0 for a pending one."""
    token_ids: list[int] = []
    for sequence, num_new in zip(schedule.sequences, schedule.num_new, strict=True):
        if sequence.num_pending:
            token_ids.append(0)
        else:
            start = sequence.num_computed
            token_ids += sequence.token_ids[start : start + num_new]
    return token_ids


def _sources(sequences: list[Sequence], query_start: np.ndarray) -> np.ndarray:
    """`[T]` int64: a pending token, always the last of its sequence, by its place among the samples of the last step;
    -1: the host knows it."""
    places = np.array([sequence.place if sequence.num_pending else -1 for sequence in sequences], np.int64)
    if query_start[-1] == len(places):
        return places
    sources = np.full(query_start[-1], -1, np.int64)
    sources[query_start[1:] - 1] = places
    return sources


def _plan_logits(schedule: Schedule, query_start: np.ndarray) -> LogitsPlan:
    """Logits of the last known token of each sequence, and of whole prompts where their logprobs are wanted."""
    sequences = schedule.sequences
    ends = query_start[1:].astype(np.int64)
    shares = zip(sequences, schedule.num_new, strict=True)
    if not [sequence for sequence, num_new in shares if not sequence.num_pending and _is_special(sequence, num_new)]:
        return LogitsPlan(ends - 1, sequences, np.arange(len(sequences)))
    indices: list[int] = []
    samples: list[tuple[Sequence, int, int]] = []  # with the row of its logits and its choice
    prompts: list[PromptRows] = []
    for sequence, first, end in zip(sequences, query_start.tolist(), ends.tolist(), strict=False):
        request = sequence.request
        is_complete = sequence.num_computed + end - first == sequence.num_tokens
        if request.wants_prompt_logprobs and sequence.is_prefilling:
            prompts.append(PromptRows(sequence, len(indices), sequence.num_computed, end - first))
            indices.extend(range(first, end))
        elif is_complete:
            indices.append(end - 1)
        if is_complete:
            choices = range(request.num_choices) if sequence.is_prefilling else (sequence.index,)
            samples.extend((sequence, len(indices) - 1, choice) for choice in choices)
    return LogitsPlan(
        indices=np.array(indices, np.int64),
        sequences=[sequence for sequence, _, _ in samples],
        rows=np.array([row for _, row, _ in samples], np.int64),
        choices=np.array([choice for _, _, choice in samples], np.int64),
        prompts=prompts,
        branches=any(map(_branches, (sequence for sequence, _, _ in samples))),
    )


def _is_special(sequence: Sequence, num_new: int) -> bool:
    """Whether a sequence does not just ask for its next token: an unfinished prompt, a fork, a beam, prompt
    logprobs."""
    if sequence.num_computed + num_new < sequence.num_tokens:
        return True
    return _branches(sequence) or (sequence.is_prefilling and sequence.request.wants_prompt_logprobs)


def _branches(sequence: Sequence) -> bool:
    """Whether the next token decides which sequences there are."""
    request = sequence.request
    return bool(request.num_beam_candidates) or (sequence.is_prefilling and request.num_choices > 1)


def uniform_noise(seeds: np.ndarray, choices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), a function of (seed, choice, position) alone: SplitMix64's finaliser over a chain of the
    three."""
    with np.errstate(over="ignore"):
        state = _mix(_mix(_mix(seeds) + choices.astype(np.uint64)) + positions.astype(np.uint64))
    return (state >> _UNTIL_53_BITS).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
