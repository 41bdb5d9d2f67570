"""Changes to single logits: biases, bans and penalties, gathered over a batch into flat arrays. Rows without any cost
nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from enginery.runtime.request import Sequence
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.token_counts import TokenCounts

_BANNED = -np.inf
_ANY = -1


@dataclass(frozen=True, slots=True)
class LogitsEdits:
    """First `logits[row, token] += offset`, entries may repeat, but where `required` is not -1, only if that is the
    row's pending token. Then, for each (row, token) once: the repetition penalty (`x / r if x > 0 else x * r`) and
    `-= frequency * count + presence * (count > 0)`, where a row's pending token counts one more.

    The first `num_pending` penalties stand for the pending tokens of their rows, whatever they may be; their count is
    0 here, and a later entry for the same token takes precedence.
    """

    bias_rows: np.ndarray
    bias_tokens: np.ndarray
    bias_offsets: np.ndarray
    bias_required: np.ndarray
    penalty_rows: np.ndarray
    penalty_tokens: np.ndarray
    counts: np.ndarray
    repetition: np.ndarray
    frequency: np.ndarray
    presence: np.ndarray
    num_pending: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Those that hold anything, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "num_pending"}
        return {name: array for name, array in every.items() if len(array)}


class EditsBuilder:
    """Collects the edits of a batch, row by row."""

    def __init__(self) -> None:
        self._bias: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        self._penalties: list[tuple[int, np.ndarray, np.ndarray, SamplingParams]] = []
        self._pending: list[tuple[int, np.ndarray, np.ndarray, SamplingParams]] = []

    def add(self, row: int, sequence: Sequence) -> None:
        request = sequence.request
        params = request.params
        if not isinstance(params, SamplingParams):
            return
        if request.bias is not None:
            tokens, offsets = request.bias
            self._bias.append((row, tokens, offsets, np.full(len(tokens), _ANY)))
        banned = _bans(sequence, params)
        if banned:
            tokens, required = np.array(banned, np.int64).T
            self._bias.append((row, tokens, np.full(len(tokens), _BANNED), required))
        if params.has_penalties:
            if sequence.token_counts is None:
                prompt = request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
                sequence.token_counts = TokenCounts(prompt, sequence.output_token_ids)
            self._penalties.append((row, sequence.token_counts.tokens, sequence.token_counts.counts, params))
            if sequence.num_pending:
                self._pending.append((row, np.array([_ANY]), np.zeros(1, np.float32), params))

    def build(self) -> LogitsEdits | None:
        penalties = self._pending + self._penalties
        if not self._bias and not penalties:
            return None
        sizes = [len(tokens) for _, tokens, _, _ in self._bias]
        widths = [len(tokens) for _, tokens, _, _ in penalties]
        return LogitsEdits(
            bias_rows=_repeat([row for row, _, _, _ in self._bias], sizes, np.int64),
            bias_tokens=_join([tokens for _, tokens, _, _ in self._bias], np.int64),
            bias_offsets=_join([offsets for _, _, offsets, _ in self._bias], np.float32),
            bias_required=_join([required for _, _, _, required in self._bias], np.int64),
            penalty_rows=_repeat([row for row, _, _, _ in penalties], widths, np.int64),
            penalty_tokens=_join([tokens for _, tokens, _, _ in penalties], np.int64),
            counts=_join([counts for _, _, counts, _ in penalties], np.float32),
            repetition=_repeat([params.repetition_penalty for _, _, _, params in penalties], widths, np.float32),
            frequency=_repeat([params.frequency_penalty for _, _, _, params in penalties], widths, np.float32),
            presence=_repeat([params.presence_penalty for _, _, _, params in penalties], widths, np.float32),
            num_pending=len(self._pending),
        )


def _bans(sequence: Sequence, params: SamplingParams) -> list[tuple[int, int]]:
    """Banned tokens, each with the pending token that it is banned after, or `_ANY`."""
    request = sequence.request
    known = len(sequence.token_ids)
    bans: list[tuple[int, int]] = []
    if sequence.num_tokens - request.num_prompt_tokens < params.min_tokens:
        bans += [(token, _ANY) for token in request.stop_token_ids]
    for *head, last in request.bad_word_ids:
        required = head.pop() if head and sequence.num_pending else _ANY
        # Only the output counts: a bad word may begin in the prompt without being the model's doing.
        tail = sequence.token_ids[max(request.num_prompt_tokens, known - len(head)) :] if head else []
        if tail == head:
            bans.append((last, required))
    return bans


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _repeat(values: list, counts: list[int], dtype: type) -> np.ndarray:
    return np.repeat(np.array(values, dtype), counts)
