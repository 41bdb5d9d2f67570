"""What a session returns, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """The logprob of one token at one position, before penalties and temperature."""

    logprob: float
    rank: int
    """1 is the most likely token."""
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""By token id: the most likely ones and the chosen one."""


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds of the monotonic clock (`time.monotonic`), None while not reached."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request. With DELTA output, text, token_ids and logprobs hold what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Over all tokens; present when logprobs were asked for."""
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the completion; None for end of sequence."""
    error: str | None = None
    """What went wrong, for finish_reason "error"."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request after a step."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    """One entry per prompt token, None for the first; complete when the first completion token is there."""
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved."""
    metrics: RequestMetrics | None = field(default=None)
