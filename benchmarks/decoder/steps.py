"""Where the time of a load goes: what each kind of step takes on the device, and how long the device waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from enginery.engine.engine import Engine
from enginery.engine.inputs import InputBuffer, StepShape
from enginery.engine.protocol import StepInputs
from enginery.runtime.batch import SamplingInputs
from enginery.runtime.sampler import Sampler, Sampling

DECODE_LIMITS = (32, 128)
"""sequences of a step with one new token each"""
MIXED_LIMITS = (256, 512, 1024, 2048)
"""tokens of any other step"""
COLUMNS = ("steps", "replayed", "tokens", "padded", "engine, ms", "sampling, ms", "waits, ms")

Moment = torch.cuda.Event | float
"""on the stream of the device, or in seconds of the host where there is no device"""


@dataclass
class Step:
    shape: StepShape
    replayed: StepShape | None
    """what it was padded to; None: it was launched as it is"""
    begin: Moment
    """its inputs are on the device"""
    computed: Moment
    """its logits are there"""
    sampled: Moment
    """its tokens are on the host"""


@contextmanager
def recorded(cuda: bool) -> Iterator[list[Step]]:
    """Fills the list with the steps that engines run meanwhile. On a GPU, their moments mean something once it is
    idle."""
    steps: list[Step] = []
    execute, send, sample = Engine.execute, InputBuffer.send, Sampler.sample

    def mark() -> Moment:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def execute_and_mark(engine: Engine, inputs: StepInputs) -> torch.Tensor:
        begin = mark()
        step = Step(StepShape.of(inputs), None, begin, begin, begin)
        steps.append(step)
        logits = execute(engine, inputs)
        step.computed = step.sampled = mark()
        step.replayed = engine.replayed(inputs)
        return logits

    def send_and_mark(buffer: InputBuffer, inputs: StepInputs, shape: StepShape) -> None:
        send(buffer, inputs, shape)
        steps[-1].begin = mark()  # while the host prepares the inputs, an idle device waits

    def sample_and_mark(sampler: Sampler, logits: torch.Tensor, inputs: SamplingInputs) -> Sampling:
        sampling = sample(sampler, logits, inputs)
        steps[-1].sampled = mark()
        return sampling

    with (
        patch.object(Engine, "execute", execute_and_mark),
        patch.object(InputBuffer, "send", send_and_mark),
        patch.object(Sampler, "sample", sample_and_mark),
    ):
        yield steps


def kind_of(shape: StepShape) -> str:
    """decode by its sequences, mixed by its tokens."""
    if shape.is_decode:
        return _kind("decode", shape.sequences, DECODE_LIMITS)
    return _kind("mixed", shape.tokens, MIXED_LIMITS)


def _kind(name: str, size: int, limits: tuple[int, ...]) -> str:
    limit = next((limit for limit in limits if size <= limit), None)
    return f"{name} > {limits[-1]}" if limit is None else f"{name} ≤ {limit}"


def summary(steps: Sequence[Step], wall: float) -> dict[str, Any]:
    """Sums by kind, smaller kinds first. `wall`: seconds that the steps took on the host, from the first to the last.

    The device waits before a step from the end of the step before until the inputs are there, copies included.
    """
    by_size = sorted(steps, key=lambda step: (not step.shape.is_decode, step.shape.tokens))
    kinds = {kind_of(step.shape): dict.fromkeys(COLUMNS, 0) for step in by_size}
    before: Step | None = None
    for step in steps:
        sums = kinds[kind_of(step.shape)]
        sums["steps"] += 1
        sums["replayed"] += step.replayed is not None
        sums["tokens"] += step.shape.tokens
        sums["padded"] += (step.replayed or step.shape).tokens
        sums["engine, ms"] += _milliseconds(step.begin, step.computed)
        sums["sampling, ms"] += _milliseconds(step.computed, step.sampled)
        sums["waits, ms"] += 0.0 if before is None else _milliseconds(before.sampled, step.begin)
        before = step
    for sums in kinds.values():
        sums["engine, ms/step"] = sums["engine, ms"] / sums["steps"]
    busy = sum(sums["engine, ms"] + sums["sampling, ms"] for sums in kinds.values()) / 1e3
    return {"device, s": busy, "device waits, s": wall - busy, "kinds": kinds}


def _milliseconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float):
        return 1e3 * (end - begin)  # type: ignore[operator]
    return begin.elapsed_time(end)
