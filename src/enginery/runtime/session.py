"""The serving loop: schedule, run, sample, settle."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from enginery.engine.protocol import Engine
from enginery.errors import RequestError, ResourceError
from enginery.runtime.batch import Batch, LogitsPlan, PromptRows
from enginery.runtime.detokenizer import Tokenizer
from enginery.runtime.intake import Intake
from enginery.runtime.outputs import Logprob, PositionLogprobs, RequestOutput
from enginery.runtime.request import Request, Sequence, Status
from enginery.runtime.response import Response
from enginery.runtime.sampler import Sampler, Samples, TopLogprobs, top_logprobs
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams
from enginery.runtime.scheduler import Schedule, Scheduled, Scheduler
from enginery.runtime.stats import SessionStats, collect

_SEED_BITS = 64


@dataclass(frozen=True)
class SessionConfig:
    """How a session serves; what it serves is the engine's."""

    eos_token_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    max_waiting: int | None = None
    """Requests that may wait; None: any number."""
    max_prompt_logits: int = 256
    """Rows of logits per step for prompt_logprobs: bounds memory at that many times the vocabulary."""
    seed: int | None = None
    """Makes the seeds of requests without one reproducible."""


@dataclass(slots=True)
class Ran:
    """One run of the engine, sampled."""

    items: list[Scheduled]
    plan: LogitsPlan | None = None
    samples: Samples | None = None
    prompts: list[tuple[PromptRows, TopLogprobs]] = field(default_factory=list)
    error: Exception | None = None


class Session:
    """Serves requests on one engine. Not thread-safe: one thread adds, steps and cancels.

    An error that belongs to one request finishes that request with finish_reason "error"; the session goes on.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, config: SessionConfig | None = None) -> None:
        self.engine = engine
        self.config = config or SessionConfig()
        limits = engine.limits
        self.scheduler = Scheduler(
            limits, prefix_caching=self.config.prefix_caching, max_prompt_logits=self.config.max_prompt_logits
        )
        self._tokenizer = tokenizer
        self._intake = Intake(limits, tokenizer, self.config.eos_token_ids)
        self._batch = Batch(limits)
        self._sampler = Sampler()
        self._responses: dict[str, Response] = {}
        self._seed = self.config.seed if self.config.seed is not None else int.from_bytes(os.urandom(8))
        self._stats = SessionStats()
        self._pending: list[RequestOutput] = []

    # ---- requests

    def add(
        self,
        prompt_token_ids: Iterable[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
        adapter: str = "",
        prompt: str | None = None,
    ) -> str:
        """Queues a request and returns its id.

        Args:
            priority: smaller is served first; equal ones by arrival.
            salt: requests of different salts never share cached prefixes.
            prompt: the text of the prompt, repeated in the output.

        Raises:
            RequestError: the request is invalid for this engine.
            ResourceError: too many requests are waiting.
        """
        number = self._stats.num_requests
        request_id = f"request-{number}" if request_id is None else request_id
        if request_id in self._responses:
            raise RequestError(f"request id {request_id!r} is in use", "Give each running request an id of its own")
        if self.config.max_waiting is not None and len(self.scheduler.waiting) >= self.config.max_waiting:
            raise ResourceError(f"{len(self.scheduler.waiting)} requests are waiting", "Try again later")
        request = self._intake.request(
            prompt_token_ids, params, request_id=request_id, number=number, priority=priority, salt=salt, prompt=prompt
        )
        seed = params.seed if isinstance(params, SamplingParams) else 0
        request.seed = (self._seed + number if seed is None else seed) % 2**_SEED_BITS
        request.cache_root = self.scheduler.cache.root(salt, adapter)
        request.sequences.append(Sequence(request, 0, list(request.prompt_token_ids)))
        self._responses[request_id] = Response(request, self._tokenizer)
        self._stats.num_requests += 1
        self._stats.num_prompt_tokens += request.num_prompt_tokens
        self.scheduler.add(request.sequences[0])
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Ends a request with finish_reason "abort" and frees its memory now; its last output comes with the next step.

        False if no such request is running.
        """
        response = self._responses.get(request_id)
        if response is None:
            return False
        self._end(response, "abort")
        output = self._report(response)
        if output is not None:
            self._pending.append(output)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._responses or self._pending)

    def generate(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams | BeamSearchParams | list[SamplingParams]
    ) -> list[RequestOutput]:
        """Serves token-id prompts to the end and returns their final outputs, in order."""
        prompts = list(prompts)
        each = params if isinstance(params, list) else [params] * len(prompts)
        ids = [self.add(prompt, wanted) for prompt, wanted in zip(prompts, each, strict=True)]
        final: dict[str, RequestOutput] = {}
        while len(final) < len(ids):
            final.update((output.request_id, output) for output in self.step() if output.finished)
        return [final[request_id] for request_id in ids]

    # ---- the step

    def step(self) -> list[RequestOutput]:
        """Advances every scheduled request; returns what is new, at most one output a request."""
        schedule = self._schedule()
        results = self._run_fenced(schedule)
        outputs = self._settle(schedule, results)
        self._stats.num_steps += 1
        return outputs

    def stats(self) -> SessionStats:
        """Counters since the start and the state of the memory now."""
        return collect(self._stats, self.scheduler)

    def close(self) -> None:
        for request_id in list(self._responses):
            self.cancel(request_id)
        self.engine.close()

    def _schedule(self) -> Schedule:
        began = time.perf_counter()
        schedule = self.scheduler.schedule()
        self._stats.schedule_seconds += time.perf_counter() - began
        return schedule

    def _run_fenced(self, schedule: Schedule) -> list[Ran]:
        """Runs the step; if that fails, each sequence by itself, so that only those which cannot run fail.

        Running again is safe: a step writes the same values to the same slots.
        """
        if not schedule.items:
            return []
        try:
            return [self._run(schedule.items)]
        except Exception as error:
            if len(schedule.items) == 1:
                return [Ran(schedule.items, error=error)]
        results = []
        for item in schedule.items:
            try:
                results.append(self._run([item]))
            except Exception as error:
                results.append(Ran([item], error=error))
        return results

    def _run(self, items: list[Scheduled]) -> Ran:
        began = time.perf_counter()
        copies = [item.copy for item in items if item.copy is not None]
        inputs, plan = self._batch.inputs(items)
        ready = time.perf_counter()
        if copies:
            self.engine.copy_blocks(copies)
        logits = self.engine.execute(inputs)
        ran = time.perf_counter()
        result = self._sample(items, plan, logits)
        self._stats.batch_seconds += ready - began
        self._stats.engine_seconds += ran - ready
        self._stats.sample_seconds += time.perf_counter() - ran
        return result

    def _sample(self, items: list[Scheduled], plan: LogitsPlan, logits: torch.Tensor) -> Ran:
        prompts = [(rows, self._prompt_logprobs(rows, logits)) for rows in plan.prompts]
        samples = None
        if plan.sequences:
            samples = self._sampler.sample(logits, self._batch.sampling_inputs(plan))
        return Ran(items, plan, samples, prompts)

    def _settle(self, schedule: Schedule, results: list[Ran]) -> list[RequestOutput]:
        """Appends tokens, forks, finishes and reports."""
        began = time.perf_counter()
        self._stats.num_scheduled_tokens += schedule.num_tokens
        touched: dict[str, Response] = {}
        for result in results:
            if result.error is not None:
                self._fail(result.items[0].sequence.request, result.error, touched)
        self.scheduler.advance(schedule)
        for result in results:
            self._settle_run(result, touched)
        reports = (self._report(response) for response in touched.values())
        outputs = self._pending + [output for output in reports if output is not None]
        self._pending = []
        self._stats.settle_seconds += time.perf_counter() - began
        return outputs

    # ---- settling

    def _settle_run(self, result: Ran, touched: dict[str, Response]) -> None:
        for rows, logprobs in result.prompts:
            self._store_prompt_logprobs(rows, logprobs)
        plan, samples = result.plan, result.samples
        if plan is None or samples is None:
            return
        for place, sequence in enumerate(plan.sequences):
            request = sequence.request
            response = self._responses.get(request.request_id)
            if response is None or response.request is not request:
                continue
            touched[request.request_id] = response
            try:
                self._settle_sample(response, sequence, place, plan, samples)
            except Exception as error:
                self._fail(request, error, touched)

    def _settle_sample(
        self, response: Response, sequence: Sequence, place: int, plan: LogitsPlan, samples: Samples
    ) -> None:
        request = response.request
        if place in samples.failed:
            raise ArithmeticError("the model gave no finite logits, or every token was banned")
        if not request.is_prefilled:
            self._begin(request)
        if response.search is not None:
            self._advance_beams(response, sequence, place, samples)
            return
        if plan.choices is not None:
            sequence = request.sequences[int(plan.choices[place])]
        token_id = samples.token_ids[place]
        sequence.token_ids.append(token_id)
        self._batch.append(sequence, token_id)
        self._stats.num_generated_tokens += 1
        if sequence.token_counts is not None:
            sequence.token_counts.add(token_id)
        if samples.logprobs is not None and place in samples.logprobs_row:
            self._add_logprobs(sequence, token_id, samples.logprobs, samples.logprobs_row[place])
        response.accept(sequence, token_id)
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)

    def _begin(self, request: Request) -> None:
        """The prompt is computed: its sequence is forked once for each further completion."""
        request.is_prefilled = True
        request.metrics.first_token_time = time.monotonic()
        root = request.sequences[0]
        for index in range(1, request.num_choices):
            child = Sequence(request, index, list(root.token_ids))
            request.sequences.append(child)
            self.scheduler.fork(root, child)

    def _advance_beams(self, response: Response, beam: Sequence, place: int, samples: Samples) -> None:
        search = response.search
        if search is None or samples.logprobs is None:
            return
        row = samples.logprobs_row[place]
        count = response.request.num_beam_candidates
        top = samples.logprobs
        search.hand_in(
            beam, list(zip(top.token_ids[row, :count].tolist(), top.values[row, :count].tolist(), strict=True))
        )
        if search.is_ready:
            self._replace_beams(response.request, search.advance())

    def _replace_beams(self, request: Request, living: list) -> None:
        """Beams without a continuation end; a beam's first continuation goes on in its place, further ones are forks."""
        parents = {continuation.parent for continuation in living}
        for beam in request.sequences:
            if beam not in parents or not living:
                self.scheduler.finish(beam)
        if not living:
            return
        heirs = set()
        grown = []
        for continuation in living:
            parent = continuation.parent
            if parent in heirs:
                child = Sequence(request, request.next_index(), list(parent.token_ids))
                self.scheduler.fork(parent, child)
                grown.append((child, continuation))
            else:
                heirs.add(parent)
                grown.append((parent, continuation))
        for sequence, continuation in grown:
            sequence.token_ids.append(continuation.token_id)
            sequence.cumulative_logprob = continuation.cumulative_logprob
            self._batch.append(sequence, continuation.token_id)
            if sequence.status is Status.PARKED:
                self.scheduler.add(sequence)
        self._stats.num_generated_tokens += len(grown)
        request.sequences = [sequence for sequence, _ in grown]

    def _fail(self, request: Request, error: Exception, touched: dict[str, Response]) -> None:
        response = self._responses.get(request.request_id)
        if response is None or response.request is not request:
            return
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self._end(response, "error", text)
        touched[request.request_id] = response

    def _end(self, response: Response, reason, error: str | None = None) -> None:
        for sequence in response.request.sequences:
            if sequence.status is not Status.FINISHED:
                self.scheduler.finish(sequence)
                response.close(sequence, reason, error)

    def _report(self, response: Response) -> RequestOutput | None:
        output = response.output()
        if response.request.is_finished:
            del self._responses[response.request.request_id]
            self._stats.count_finished(response.request)
        return output

    # ---- logprobs

    def _prompt_logprobs(self, rows: PromptRows, logits: torch.Tensor) -> TopLogprobs:
        request = rows.sequence.request
        following = request.prompt_token_ids[rows.first_position + 1 : rows.first_position + 1 + rows.count]
        mine = logits[rows.first_row : rows.first_row + len(following)]
        return top_logprobs(mine, torch.tensor(following, dtype=torch.int64), request.params.prompt_logprobs)

    def _store_prompt_logprobs(self, rows: PromptRows, logprobs: TopLogprobs) -> None:
        request = rows.sequence.request
        if request.prompt_logprobs is None:
            return
        for row in range(len(logprobs.chosen)):
            position = rows.first_position + 1 + row
            request.prompt_logprobs[position] = self._position(request.prompt_token_ids[position], logprobs, row, None)

    def _add_logprobs(self, sequence: Sequence, token_id: int, logprobs: TopLogprobs, row: int) -> None:
        if sequence.logprobs is None:
            sequence.logprobs = []
        sequence.logprobs.append(self._position(token_id, logprobs, row, sequence.request.params.logprobs))
        sequence.cumulative_logprob += float(logprobs.chosen[row])

    def _position(self, token_id: int, logprobs: TopLogprobs, row: int, count: int | None) -> PositionLogprobs:
        """The `count` most likely tokens of one position, and the chosen one."""
        ids = logprobs.token_ids[row, :count].tolist()
        values = logprobs.values[row, :count].tolist()
        found = {
            i: Logprob(v, rank, self._token_text(i)) for rank, (i, v) in enumerate(zip(ids, values, strict=True), 1)
        }
        if token_id not in found:
            chosen = Logprob(float(logprobs.chosen[row]), int(logprobs.ranks[row]), self._token_text(token_id))
            found = {token_id: chosen, **found}
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id])
