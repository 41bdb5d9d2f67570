"""A request and the sequences that it grows into. State only; the scheduler and the session move it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from enginery.runtime.outputs import FinishReason, PositionLogprobs, RequestMetrics
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams
from enginery.runtime.token_counts import TokenCounts


class Status(Enum):
    WAITING = "waiting"
    """In the waiting queue; owns no blocks and no row."""
    RUNNING = "running"
    """Owns a row of the batch and the blocks of its computed tokens."""
    PARKED = "parked"
    """A beam whose step is done but whose siblings' is not, and which lost its blocks: nothing to compute, nowhere
    queued."""
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """What one caller asked for. It begins as one sequence, which is forked when the prompt has been computed."""

    request_id: str
    number: int
    """Counts up with arrival; orders requests of equal priority."""
    prompt_token_ids: list[int]
    params: SamplingParams | BeamSearchParams
    max_tokens: int
    """Resolved against the context: how many tokens each sequence may generate."""
    stop_token_ids: frozenset[int]
    """All ids that end a sequence, end of sequence included unless it is ignored."""
    metrics: RequestMetrics
    priority: int = 0
    seed: int = 0
    cache_root: bytes = b""
    """Prefix-cache namespace of its first block."""
    num_choices: int = 1
    """Sequences sampled from the prompt's logits."""
    num_forks: int = 0
    """Sequences that join the first one when the prompt is computed."""
    num_beam_candidates: int = 0
    num_beams_made: int = 0
    wants_prompt_logprobs: bool = False
    reads_prefix_cache: bool = True
    """Whether the prompt may be taken from the cache; after it was computed once, recomputation may always be."""
    has_edits: bool = False
    """Whether any step changes single logits."""
    bias: tuple[np.ndarray, np.ndarray] | None = None
    """Token ids, int64, and offsets, float32, of the logit bias."""
    bad_word_ids: tuple[list[int], ...] = ()
    prompt: str | None = None
    sequences: list[Sequence] = field(default_factory=list)
    """One per completion, by index; with beam search, the live beams."""
    is_prefilled: bool = False
    """The prompt has been computed once: first tokens are sampled and n > 1 is forked."""
    num_cached_tokens: int | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def next_index(self) -> int:
        """A new index for a beam; beams are forked and dropped many times."""
        self.num_beams_made += 1
        return self.num_beams_made

    @property
    def is_finished(self) -> bool:
        finished = Status.FINISHED
        return not [sequence for sequence in self.sequences if sequence.status is not finished]


class Sequence:
    """Tokens that want their keys and values computed, up to the last, whose logits give the next token."""

    __slots__ = (
        "blocks",
        "cumulative_logprob",
        "digests",
        "error",
        "finish_reason",
        "index",
        "logprobs",
        "max_length",
        "num_computed",
        "num_pending",
        "num_writable",
        "order",
        "place",
        "request",
        "row",
        "status",
        "stop_reason",
        "token_counts",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, token_ids: list[int]) -> None:
        self.request = request
        self.index = index
        self.order = (request.priority, request.number, index)
        """Scheduling order; smaller is served first and preempted last."""
        self.token_ids = token_ids
        """Prompt and output."""
        self.max_length = request.num_prompt_tokens + request.max_tokens
        """Tokens that it has when it must end."""
        self.num_computed = 0
        """Leading tokens whose keys and values are in the cache."""
        self.num_pending = 0
        """Tokens sampled already, which are not yet on the host: 0 or 1."""
        self.place = -1
        """Of the pending token among the samples of the last step."""
        self.blocks: list[int] = []
        self.num_writable = 0
        """Tokens for which it has blocks that nobody else writes to; 0: its blocks have yet to be looked at, and its
        row of the batch to be filled."""
        self.digests: list[bytes] = []
        """Prefix-cache digests of the leading full blocks that were published or hit."""
        self.row = -1
        """Its row in the batch while running."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[PositionLogprobs] | None = None
        self.token_counts: TokenCounts | None = None
        """Kept where penalties need it."""

    @property
    def num_tokens(self) -> int:
        """The pending one counted in."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_prefilling(self) -> bool:
        """No token has been sampled yet from the prompt of its request."""
        return not (self.num_pending or self.request.is_prefilled)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]
