"""The serving loop: schedule, run, sample, settle.

Two forms of it. The plain loop does the four one after another. The overlapped loop, for engines that run beside the
host, launches a step before it settles the one before: while the device computes, the host takes tokens to requests
and prepares what comes next. The newest token of a sequence is then *pending*: sampled, on the device, and read there
by the next step. A sequence that ends by its pending token is computed once too often; that outcome is dropped.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from operator import length_hint

import torch

from enginery.engine.protocol import Engine, StepInputs
from enginery.errors import DeviceError, QueueFullError, RequestError, UsageError
from enginery.runtime.batch import Batch, LogitsPlan, PromptRows
from enginery.runtime.detokenizer import Tokenizer
from enginery.runtime.intake import Intake
from enginery.runtime.logprobs import PendingLogprobs, top_logprobs
from enginery.runtime.outputs import RequestOutput
from enginery.runtime.request import Request, Sequence, Status
from enginery.runtime.sampler import Sampler, Sampling
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams, final_only
from enginery.runtime.scheduler import Schedule, Scheduler
from enginery.runtime.settler import Ran, Settler, on_one_line
from enginery.runtime.stats import SessionStats, collect

_SEED_BITS = 64


@dataclass(frozen=True)
class SessionConfig:
    """How a session serves; what it serves is the engine's."""

    eos_token_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    max_waiting: int | None = None
    """Sequences that may wait before `add` refuses more; None: any number."""
    max_prompt_logits: int = 256
    """Rows of logits per step for prompt_logprobs: bounds memory at that many times the vocabulary."""
    seed: int | None = None
    """Makes the seeds of requests without one reproducible."""
    overlap: bool | None = None
    """Prepare a step while the one before runs; changes no result. None: where the engine runs beside the host."""

    def __post_init__(self) -> None:
        if self.max_waiting is not None and self.max_waiting < 1:
            raise UsageError(f"max_waiting={self.max_waiting} admits no request", "Give at least 1, or None")
        if self.max_prompt_logits < 1:
            raise UsageError(f"max_prompt_logits={self.max_prompt_logits} is too small", "Give at least 1")
        if self.seed is not None and type(self.seed) is not int:
            raise UsageError(f"seed is {self.seed!r}, not a whole number", "Give an integer, or None")


@dataclass(slots=True)
class Run:
    """The engine at work on some sequences: launched and sampled, its outcome not yet on the host."""

    schedule: Schedule
    plan: LogitsPlan
    sampling: Sampling | None
    prompts: list[tuple[PromptRows, PendingLogprobs]]

    def wait(self) -> Ran:
        """Blocks until the outcome is there."""
        samples = None if self.sampling is None else self.sampling.wait()
        return Ran(self.schedule, self.plan, samples, [(rows, logprobs.wait()) for rows, logprobs in self.prompts])


@dataclass(slots=True)
class Flight:
    """A step on its way."""

    schedule: Schedule
    runs: list[Run | Ran]
    """One, or after an error one for each sequence."""

    is_foreseeable: bool
    """Which sequences go on is known before its tokens are: nothing forks, no beam moves, nothing failed."""

    @property
    def sampled(self) -> torch.Tensor | None:
        """`[P]` int64 on the device."""
        run = self.runs[0] if self.runs else None
        return run.sampling.token_ids if isinstance(run, Run) and run.sampling is not None else None

    def mark_pending(self) -> None:
        """The sequences that it samples have one token more, which the host does not know."""
        for run in self.runs:
            for place, sequence in enumerate(run.plan.sequences if isinstance(run, Run) else ()):
                sequence.num_pending, sequence.place = 1, place


class Session:
    """Serves requests on one engine. Not thread-safe: one thread adds, steps and cancels.

    An error that belongs to one request finishes that request with finish_reason "error"; the session goes on. Only a
    device that is lost ends it: `step` raises DeviceError.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, config: SessionConfig | None = None) -> None:
        self.engine = engine
        self.config = config or SessionConfig()
        limits = engine.limits
        self.scheduler = Scheduler(
            limits, prefix_caching=self.config.prefix_caching, max_prompt_logits=self.config.max_prompt_logits
        )
        self._intake = Intake(limits, tokenizer, self.config.eos_token_ids)
        self._batch = Batch(limits)
        self._sampler = Sampler()
        self._stats = SessionStats()
        self._settler = Settler(self.scheduler, tokenizer, self._stats)
        self._requests: dict[str, Request] = {}
        self._seed = self.config.seed if self.config.seed is not None else int.from_bytes(os.urandom(8))
        self._overlaps = engine.is_asynchronous if self.config.overlap is None else self.config.overlap
        self._flight: Flight | None = None
        self._pending: list[RequestOutput] = []
        self._is_closed = False

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
            QueueFullError: too many requests are waiting.
        """
        number = self._stats.num_requests
        request_id = f"request-{number}" if request_id is None else request_id
        if self._is_closed:
            raise UsageError("the model is closed", "Open it again")
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", "Give each running request an id of its own")
        if self.is_full:
            raise QueueFullError(f"{len(self.scheduler.waiting)} requests are waiting", "Try again later")
        request = self._intake.request(
            prompt_token_ids, params, request_id=request_id, number=number, priority=priority, salt=salt, prompt=prompt
        )
        seed = params.seed if isinstance(params, SamplingParams) else 0
        request.seed = (self._seed + number if seed is None else seed) % 2**_SEED_BITS
        request.cache_root = self.scheduler.cache.root(salt, adapter)
        request.sequences.append(Sequence(request, 0, list(request.prompt_token_ids)))
        self._requests[request_id] = request
        self._settler.begin(request)
        self._stats.num_requests += 1
        self._stats.num_prompt_tokens += request.num_prompt_tokens
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Ends a request with finish_reason "abort" and frees its memory now; its last output comes with the next step.

        False if no such request is running.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._settler.end(request, "abort")
        output = self._settler.report(request)
        if output is not None:
            self._pending.append(output)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._pending or self._flight)

    @property
    def is_full(self) -> bool:
        """Whether `add` would refuse a request now."""
        return self.config.max_waiting is not None and len(self.scheduler.waiting) >= self.config.max_waiting

    def generate(
        self,
        prompts: Iterable[Iterable[int]],
        params: SamplingParams | BeamSearchParams | Iterable[SamplingParams | BeamSearchParams],
        texts: Iterable[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Serves token-id prompts to the end and returns their final outputs, in order, whatever their output_kind.

        Parameters are shared or one per prompt; `texts`: of the prompts, repeated in the outputs. Where not all can run
        at once, those that may become longest start first. Outputs of requests added elsewhere come with the next step.
        If anything raises, the prompts of this call are cancelled.
        """
        prompts = list(prompts)
        if isinstance(params, (SamplingParams, BeamSearchParams)):
            each = [final_only(params)] * len(prompts)
        else:
            each = [final_only(wanted) for wanted in params]
        texts = [None] * len(prompts) if texts is None else texts
        waiting = deque(zip(prompts, each, texts, self._longest_first(prompts, each), strict=True))
        final: dict[str, RequestOutput | None] = {}
        others: list[RequestOutput] = []
        num_final = 0
        try:
            while waiting or num_final < len(final):
                while waiting and not self.is_full:
                    tokens, wanted, text, priority = waiting.popleft()
                    final[self.add(tokens, wanted, prompt=text, priority=priority)] = None
                for output in self.step():
                    if output.request_id not in final:
                        others.append(output)
                    elif output.finished:
                        final[output.request_id] = output
                        num_final += 1
        finally:
            self._pending += others
            for request_id in final:
                self.cancel(request_id)
        return [output for output in final.values() if output is not None]

    def _longest_first(
        self, prompts: list[Iterable[int]], params: list[SamplingParams | BeamSearchParams]
    ) -> list[int]:
        """Priorities of a batch, so that no long request is left to run alone at the end (Graham, "Bounds on
        multiprocessing timing anomalies", 1969). All equal where memory does not hold the longest ones side by side:
        they would preempt each other."""
        limits = self.engine.limits
        longest: list[int] = []
        needed: list[int] = []
        for tokens, wanted in zip(prompts, params, strict=True):
            length = length_hint(tokens)
            new = min(wanted.max_tokens or limits.max_model_len, max(1, limits.max_model_len - length))
            width = wanted.beam_width if isinstance(wanted, BeamSearchParams) else wanted.n
            longest.append(new)
            needed += [self.scheduler.blocks.blocks_for(length + new)] * width
        side_by_side = sorted(needed, reverse=True)[: limits.max_num_seqs]
        if len(needed) <= limits.max_num_seqs or sum(side_by_side) > limits.num_blocks:
            return [0] * len(prompts)
        # The longest has the priority of requests added elsewhere: a batch is not to overtake them.
        most = max(longest)
        return [most - new for new in longest]

    # ---- the step

    def step(self) -> list[RequestOutput]:
        """Advances every scheduled request; returns what is new, at most one output a request.

        In the overlapped loop, what is new comes from the step that the call before launched.
        """
        before, self._flight = self._flight, None
        if before is not None and not before.is_foreseeable:
            return self._settle(before)
        schedule = self._schedule()
        flight = self._launch(schedule, before)
        if not self._overlaps:
            return self._settle(flight or self._launch_each(schedule))
        outputs = self._settle(before)
        if flight is None:
            flight = self._launch_each(schedule)
        elif flight.is_foreseeable:
            flight.mark_pending()
        self._flight = flight if flight.runs else None
        return outputs

    def stats(self) -> SessionStats:
        """Counters since the start and the state of the memory now."""
        return collect(self._stats, self.scheduler)

    def reset_prefix_cache(self) -> None:
        """Forgets what freed blocks hold; running requests keep theirs."""
        self.scheduler.blocks.drop_cached()

    def close(self) -> None:
        """Cancels everything and closes the engine."""
        for request_id in list(self._requests):
            self.cancel(request_id)
        self._is_closed = True
        self.engine.close()

    def _schedule(self) -> Schedule:
        began = time.perf_counter()
        schedule = self.scheduler.schedule()
        self._stats.peak_used_blocks = max(self._stats.peak_used_blocks, self.scheduler.blocks.num_used)
        self._stats.schedule_seconds += time.perf_counter() - began
        return schedule

    def _launch(self, schedule: Schedule, before: Flight | None) -> Flight | None:
        """Sends a step on its way, behind `before`, whose tokens may still be pending; None if that fails."""
        if not schedule.sequences:
            return Flight(schedule, [], is_foreseeable=True)
        try:
            run = self._run(schedule, None if before is None else before.sampled)
        except DeviceError:
            raise
        except Exception:
            return None
        return Flight(schedule, [run], is_foreseeable=not run.plan.branches)

    def _launch_each(self, schedule: Schedule) -> Flight:
        """Runs a step that failed again, each sequence by itself, so that only those which cannot run fail.

        Running again is safe: a step writes the same values to the same slots. No token is pending.
        """
        runs: list[Run | Ran] = []
        for alone in schedule.each():
            if alone.sequences[0].status is Status.RUNNING:
                try:
                    runs.append(self._run(alone, None))
                except DeviceError:
                    raise
                except Exception as error:
                    runs.append(Ran(alone, error=on_one_line(error)))
        return Flight(schedule, runs, is_foreseeable=False)

    def _run(self, schedule: Schedule, sampled: torch.Tensor | None) -> Run:
        began = time.perf_counter()
        copies = [change.copy for change in schedule.changes if change.copy is not None]
        inputs, plan = self._batch.inputs(schedule, sampled)
        ready = time.perf_counter()
        if copies:
            self.engine.copy_blocks(copies)
        logits = self.engine.execute(inputs)
        ran = time.perf_counter()
        run = self._sample(schedule, inputs, plan, logits)
        self.scheduler.advance(schedule)
        self._stats.batch_seconds += ready - began
        self._stats.engine_seconds += ran - ready
        self._stats.sample_seconds += time.perf_counter() - ran
        return run

    def _sample(self, schedule: Schedule, inputs: StepInputs, plan: LogitsPlan, logits: torch.Tensor) -> Run:
        prompts = [(rows, self._prompt_logprobs(rows, logits)) for rows in plan.prompts]
        sampling = None
        if plan.sequences:
            sampling = self._sampler.sample(logits, self._batch.sampling_inputs(inputs, plan))
        return Run(schedule, plan, sampling, prompts)

    def _prompt_logprobs(self, rows: PromptRows, logits: torch.Tensor) -> PendingLogprobs:
        request = rows.sequence.request
        params = request.params
        count = params.prompt_logprobs or 0 if isinstance(params, SamplingParams) else 0
        following = request.prompt_token_ids[rows.first_position + 1 : rows.first_position + 1 + rows.count]
        mine = logits[rows.first_row : rows.first_row + len(following)].float()
        return top_logprobs(mine, torch.tensor(following, dtype=torch.int64), count)

    def _settle(self, flight: Flight | None) -> list[RequestOutput]:
        outputs, self._pending = self._pending, []
        if flight is not None:
            began = time.perf_counter()
            results = [ran for run in flight.runs for ran in self._wait(run)]
            there = time.perf_counter()
            outputs += self._settler.settle(flight.schedule, results)
            self._stats.num_steps += 1
            self._stats.engine_seconds += there - began
            self._stats.settle_seconds += time.perf_counter() - there
        for output in outputs:
            if output.finished:
                self._requests.pop(output.request_id, None)
        return outputs

    def _wait(self, run: Run | Ran) -> list[Ran]:
        """The outcome. A device that fails while it computes is lost with all that it holds."""
        if isinstance(run, Ran):
            return [run]
        try:
            return [run.wait()]
        except RuntimeError as error:
            raise DeviceError(f"the GPU failed in a step: {str(error).splitlines()[0][:300]}", "Start again") from error
