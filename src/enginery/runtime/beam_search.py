"""Beam search over the sequences of one request.

The search is that of transformers: of the best continuations of all live beams, those that end are kept as hypotheses
if they are among the `beam_width` best, and the best `beam_width` others live on. A hypothesis scores cumulative
logprob / generated length ** length_penalty. Beams need not be computed in the same step: each hands in its
candidates, and the search advances when all have.
"""

from __future__ import annotations

from dataclasses import dataclass

from enginery.runtime.request import Request, Sequence
from enginery.runtime.sampling_params import BeamSearchParams


@dataclass(slots=True)
class Hypothesis:
    """A finished beam."""

    token_ids: list[int]
    """Output only, the token that ended it included."""
    cumulative_logprob: float
    score: float
    ended_by: int | None
    """The stop token; None at max_tokens."""


@dataclass(slots=True)
class Continuation:
    parent: Sequence
    token_id: int
    cumulative_logprob: float


def num_candidates(width: int, num_stop_tokens: int) -> int:
    """Continuations to look at, so that `width` live ones remain even if every beam may end in each of its stop
    tokens."""
    return width * max(2, 1 + num_stop_tokens)


class BeamSearch:
    """Live beams' candidates and finished hypotheses of one request. Knows tokens and scores, not blocks."""

    def __init__(self, request: Request, params: BeamSearchParams) -> None:
        self.hypotheses: list[Hypothesis] = []
        """Best first, at most beam_width."""
        self.is_done = False
        self._request = request
        self._params = params
        self._candidates: dict[Sequence, list[tuple[int, float]]] = {}

    def hand_in(self, beam: Sequence, candidates: list[tuple[int, float]]) -> None:
        """Best next tokens of a beam, with their logprobs."""
        self._candidates[beam] = candidates

    @property
    def is_ready(self) -> bool:
        return len(self._candidates) == len(self._request.sequences)

    def advance(self) -> list[Continuation]:
        """Takes all candidates, files finished hypotheses, and returns the beams that live on, best first; none when
        done."""
        continuations = self._best_continuations()
        length = len(continuations[0].parent.token_ids) - self._request.num_prompt_tokens + 1
        at_end = length >= self._request.max_tokens
        width = self._params.beam_width
        stops = self._request.stop_token_ids
        ended = [c for c in continuations[:width] if at_end or c.token_id in stops]
        self._file(ended, length)
        living = [] if at_end else [c for c in continuations if c.token_id not in stops][:width]
        self._candidates.clear()
        self.is_done = not living or self._cannot_improve(living[0].cumulative_logprob, length)
        return [] if self.is_done else living

    def _best_continuations(self) -> list[Continuation]:
        found = [
            Continuation(beam, token_id, beam.cumulative_logprob + logprob)
            for beam, candidates in self._candidates.items()
            for token_id, logprob in candidates
        ]
        found.sort(key=lambda continuation: -continuation.cumulative_logprob)
        return found[: self._request.num_beam_candidates]

    def _file(self, ended: list[Continuation], length: int) -> None:
        """Keeps the best hypotheses of the old and the new ones."""
        for continuation in ended:
            output = [*continuation.parent.output_token_ids, continuation.token_id]
            score = continuation.cumulative_logprob / length**self._params.length_penalty
            ended_by = continuation.token_id if continuation.token_id in self._request.stop_token_ids else None
            self.hypotheses.append(Hypothesis(output, continuation.cumulative_logprob, score, ended_by))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._params.beam_width :]

    def _cannot_improve(self, best_living: float, length: int) -> bool:
        """Whether no live beam can still displace a hypothesis, by the estimate that `early_stopping` names."""
        if len(self.hypotheses) < self._params.beam_width:
            return False
        if self._params.early_stopping is True:
            return True
        penalty = self._params.length_penalty
        is_longest = self._params.early_stopping == "never" and penalty > 0
        reach = self._request.max_tokens if is_longest else length
        return best_living / reach**penalty <= self.hypotheses[-1].score
