"""Changes to single logits: biases, bans and penalties, gathered over a batch into flat arrays. Rows without any cost
nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from enginery.runtime.request import Sequence
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.token_counts import TokenCounts

_BANNED = -np.inf


@dataclass(frozen=True, slots=True)
class LogitsEdits:
    """First `logits[row, token] += offset`, entries may repeat. Then, for each (row, token) once: the repetition
    penalty (`x / r if x > 0 else x * r`) and `-= reduction`, the presence and frequency penalties."""

    bias_rows: np.ndarray
    bias_tokens: np.ndarray
    bias_offsets: np.ndarray
    penalty_rows: np.ndarray
    penalty_tokens: np.ndarray
    repetition: np.ndarray
    reduction: np.ndarray


class EditsBuilder:
    """Collects the edits of a batch, row by row."""

    def __init__(self) -> None:
        self._bias: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._penalties: list[tuple[int, TokenCounts, SamplingParams]] = []

    def add(self, row: int, sequence: Sequence) -> None:
        request = sequence.request
        params = request.params
        if not isinstance(params, SamplingParams):
            return
        if request.bias is not None:
            self._bias.append((row, *request.bias))
        banned = _banned_tokens(sequence, params)
        if banned:
            self._bias.append((row, np.array(banned, np.int64), np.full(len(banned), _BANNED, np.float32)))
        if params.has_penalties:
            if sequence.token_counts is None:
                prompt = request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
                sequence.token_counts = TokenCounts(prompt, sequence.output_token_ids)
            self._penalties.append((row, sequence.token_counts, params))

    def build(self) -> LogitsEdits | None:
        if not self._bias and not self._penalties:
            return None
        return LogitsEdits(
            bias_rows=_repeat(
                [row for row, _, _ in self._bias], [len(tokens) for _, tokens, _ in self._bias], np.int64
            ),
            bias_tokens=_join([tokens for _, tokens, _ in self._bias], np.int64),
            bias_offsets=_join([offsets for _, _, offsets in self._bias], np.float32),
            penalty_rows=self._spread([row for row, _, _ in self._penalties], np.int64),
            penalty_tokens=_join([counts.tokens for _, counts, _ in self._penalties], np.int64),
            repetition=self._spread([params.repetition_penalty for _, _, params in self._penalties], np.float32),
            reduction=_join([_reduction(counts, params) for _, counts, params in self._penalties], np.float32),
        )

    def _spread(self, values: list, dtype: type) -> np.ndarray:
        return _repeat(values, [counts.size for _, counts, _ in self._penalties], dtype)


def _banned_tokens(sequence: Sequence, params: SamplingParams) -> list[int]:
    request = sequence.request
    banned: list[int] = []
    if sequence.num_output_tokens < params.min_tokens:
        banned += request.stop_token_ids
    for *head, last in request.bad_word_ids:
        # Only the output counts: a bad word may begin in the prompt without being the model's doing.
        tail = sequence.token_ids[max(request.num_prompt_tokens, sequence.num_tokens - len(head)) :] if head else []
        if tail == head:
            banned.append(last)
    return banned


def _reduction(counts: TokenCounts, params: SamplingParams) -> np.ndarray:
    return params.frequency_penalty * counts.counts + params.presence_penalty * (counts.counts > 0)


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _repeat(values: list, counts: list[int], dtype: type) -> np.ndarray:
    return np.repeat(np.array(values, dtype), counts)
