"""Takes the outcome of a step to the requests: tokens are appended, sequences fork and end, callers get their
outputs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from enginery.runtime.batch import LogitsPlan, PromptRows
from enginery.runtime.beam_search import Continuation
from enginery.runtime.detokenizer import Tokenizer
from enginery.runtime.logprobs import TopLogprobs
from enginery.runtime.outputs import FinishReason, Logprob, PositionLogprobs, RequestOutput
from enginery.runtime.request import Request, Sequence, Status
from enginery.runtime.response import Response
from enginery.runtime.sampler import Samples
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.scheduler import Schedule, Scheduler
from enginery.runtime.stats import SessionStats


@dataclass(slots=True)
class Ran:
    """The outcome of one run of the engine, or the error that stopped it, then of one sequence."""

    schedule: Schedule
    plan: LogitsPlan | None = None
    samples: Samples | None = None
    prompts: list[tuple[PromptRows, TopLogprobs]] = field(default_factory=list)
    error: str | None = None
    """Its text: the exception would hold the tensors of the step, whose memory the next one may need."""


def on_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Settler:
    """Owns the responses of all requests that are not finished. A request that cannot be settled fails alone."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None, stats: SessionStats) -> None:
        self.responses: dict[Request, Response] = {}
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._stats = stats

    def begin(self, request: Request) -> None:
        """A new request, with its first sequence."""
        self.responses[request] = Response(request, self._tokenizer)
        self._scheduler.add(request.sequences[0])

    def settle(self, schedule: Schedule, results: list[Ran]) -> list[RequestOutput]:
        """One output for each request that has something to report."""
        touched: dict[Request, None] = {}
        for result in results:
            if result.error is not None:
                request = result.schedule.sequences[0].request
                if request in self.responses:
                    self.fail(request, result.error)
                    touched[request] = None
        self._scheduler.publish(schedule)
        for result in results:
            for rows, logprobs in result.prompts:
                self._store_prompt_logprobs(rows, logprobs)
            if result.plan is not None and result.samples is not None:
                self._settle_samples(result.plan, result.samples, touched)
        self._stats.num_scheduled_tokens += schedule.num_tokens
        outputs = [self.report(request) for request in touched]
        return [output for output in outputs if output is not None]

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Ends all sequences of a request that have not ended, and frees what they own."""
        response = self.responses[request]
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                self._scheduler.finish(sequence)
                response.close(sequence, reason, error)

    def fail(self, request: Request, error: str) -> None:
        if request in self.responses:
            self.end(request, "error", error)

    def report(self, request: Request) -> RequestOutput | None:
        """What the caller sees now. A finished request is forgotten."""
        response = self.responses[request]
        finished = request.is_finished
        if finished:
            request.metrics.finished_time = time.monotonic()
            self._stats.count_finished(request)
            del self.responses[request]
        return response.output(finished)

    # ---- samples

    def _settle_samples(self, plan: LogitsPlan, samples: Samples, touched: dict[Request, None]) -> None:
        token_ids, failed, choices = samples.token_ids, samples.failed, plan.choices
        finished = Status.FINISHED  # a member of an enum is slow to look up
        for place, sequence in enumerate(plan.sequences):
            request = sequence.request
            response = self.responses.get(request)
            if response is None:
                continue  # it ended while the step was on its way
            try:
                if not request.is_prefilled:
                    self._fork_prompt(request)
                if choices is not None and request.num_choices > 1:
                    sequence = request.sequences[int(choices[place])]
                if sequence.status is finished:
                    continue  # computed once too often
                if place in failed:
                    raise ArithmeticError("the model gave no finite logits, or every token was banned")
                if response.search is None:
                    self._append(response, sequence, token_ids[place])
                    if samples.logprobs is not None and place in samples.logprobs_row:
                        self._add_logprobs(sequence, samples.logprobs, samples.logprobs_row[place])
                else:
                    self._extend_beam(response, sequence, samples, place)
                if response.is_streamed or sequence.status is finished:
                    touched[request] = None
            except Exception as error:
                touched[request] = None
                self.fail(request, on_one_line(error))

    def _append(self, response: Response, sequence: Sequence, token_id: int) -> None:
        """The next token, pending until now, which may end the sequence."""
        sequence.num_pending = 0
        sequence.token_ids.append(token_id)
        self._stats.num_generated_tokens += 1
        if sequence.token_counts is not None:
            sequence.token_counts.add(token_id)
        request = sequence.request
        if token_id in request.stop_token_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = token_id if token_id in request.params.stop_token_ids else None
        elif len(sequence.token_ids) >= sequence.max_length:
            sequence.finish_reason = "length"
        if response.follows_text:
            response.extend_text(sequence, token_id)
        if sequence.finish_reason is not None:
            self._scheduler.finish(sequence)

    def _fork_prompt(self, request: Request) -> None:
        """The prompt is computed: its sequence is forked once for each further completion."""
        request.is_prefilled = True
        request.metrics.first_token_time = time.monotonic()
        root = request.sequences[0]
        for index in range(1, request.num_choices):
            child = Sequence(request, index, list(root.token_ids))
            request.sequences.append(child)
            self._scheduler.fork(root, child)

    # ---- beams

    def _extend_beam(self, response: Response, beam: Sequence, samples: Samples, place: int) -> None:
        search, top = response.search, samples.logprobs
        if search is None or top is None:
            return
        row = samples.logprobs_row[place]
        count = response.request.num_beam_candidates
        token_ids, values = top.token_ids[row, :count].tolist(), top.values[row, :count].tolist()
        search.hand_in(beam, list(zip(token_ids, values, strict=True)))
        if search.is_ready:
            self._replace_beams(response.request, search.advance())

    def _replace_beams(self, request: Request, living: list[Continuation]) -> None:
        """A beam without a continuation ends. Its first continuation goes on in its place; further ones are forks."""
        parents = {continuation.parent for continuation in living}
        for beam in request.sequences:
            if beam not in parents:
                self._scheduler.finish(beam)
        if not living:
            return
        heirs = [self._heir(request, continuation, parents) for continuation in living]
        for heir, continuation in zip(heirs, living, strict=True):
            heir.token_ids.append(continuation.token_id)
            heir.cumulative_logprob = continuation.cumulative_logprob
            if heir.status is Status.PARKED:
                self._scheduler.add(heir)
        self._stats.num_generated_tokens += len(heirs)
        request.sequences = heirs

    def _heir(self, request: Request, continuation: Continuation, unclaimed: set[Sequence]) -> Sequence:
        parent = continuation.parent
        if parent in unclaimed:
            unclaimed.remove(parent)
            return parent
        child = Sequence(request, request.next_index(), list(parent.token_ids))
        self._scheduler.fork(parent, child)
        return child

    # ---- logprobs

    def _store_prompt_logprobs(self, rows: PromptRows, logprobs: TopLogprobs) -> None:
        request = rows.sequence.request
        if request.prompt_logprobs is None:
            return
        for row in range(len(logprobs.chosen)):
            position = rows.first_position + 1 + row
            request.prompt_logprobs[position] = self._position(request.prompt_token_ids[position], logprobs, row, None)

    def _add_logprobs(self, sequence: Sequence, logprobs: TopLogprobs, row: int) -> None:
        """Of its newest token."""
        params = sequence.request.params
        if not isinstance(params, SamplingParams):
            return
        if sequence.logprobs is None:
            sequence.logprobs = []
        sequence.logprobs.append(self._position(sequence.token_ids[-1], logprobs, row, params.logprobs))
        sequence.cumulative_logprob += float(logprobs.chosen[row])

    def _position(self, token_id: int, logprobs: TopLogprobs, row: int, count: int | None) -> PositionLogprobs:
        """The chosen token of one position, if it is not among them, and the `count` most likely ones."""
        ids = logprobs.token_ids[row, :count].tolist()
        values = logprobs.values[row, :count].tolist()
        found: PositionLogprobs = {}
        if token_id not in ids:
            chosen = float(logprobs.chosen[row])
            found[token_id] = Logprob(chosen, int(logprobs.ranks[row]), self._token_text(token_id))
        for rank, (other, value) in enumerate(zip(ids, values, strict=True), 1):
            found[other] = Logprob(value, rank, self._token_text(other))
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id])
