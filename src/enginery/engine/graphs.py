"""Steps on a GPU: padded to one of few shapes and replayed as a CUDA graph, or launched kernel by kernel where no shape
holds them.

A decoding step of an 8B model is some four hundred kernels of a few microseconds; launched one by one they would wait
for the host. A graph is captured per shape, the usual ones when the engine opens and others when they are first met.
All graphs take their memory from one pool: only one runs at a time, so together they need what the largest needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from enginery.engine.buckets import Buckets
from enginery.engine.inputs import InputBuffer, StepShape, gathered
from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.engine.steps import Step
from enginery.errors import StepError


@dataclass(frozen=True)
class Captured:
    """A step of one shape."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    """where a replay leaves them; memory of the pool, valid until the next replay"""


class LaunchedStep:
    """Runs every step kernel by kernel."""

    def __init__(self, step: Step, buffer: InputBuffer) -> None:
        self._step = step
        self._buffer = buffer

    def __call__(self, inputs: StepInputs, shape: StepShape | None = None) -> torch.Tensor:
        """Logits `[≥ L, vocab_size]`; `shape`: to which the inputs are padded."""
        shape = shape or StepShape.of(inputs)
        self._buffer.send(inputs, shape)
        return self.run(shape)

    def run(self, shape: StepShape) -> torch.Tensor:
        """Of what the buffer holds."""
        return self._step(gathered(self._buffer.views(shape)))


class GraphedStep:
    """Replays a step's graph where a shape holds the step, and launches it otherwise."""

    def __init__(
        self, launched: LaunchedStep, rehearsed: LaunchedStep, buffer: InputBuffer, limits: EngineLimits
    ) -> None:
        """`rehearsed` launches every kernel of `launched`, each of them once if it can."""
        self.buckets = Buckets.of(limits)
        self._launched = launched
        self._rehearsed = rehearsed
        self._buffer = buffer
        self._captured: dict[StepShape, Captured | None] = {}
        self._can_capture = True
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits `[≥ L, vocab_size]`, valid until the next call."""
        exact = StepShape.of(inputs)
        shape = self.buckets.fitting(exact)
        captured = None if shape is None else self._once(shape)
        if shape is None or captured is None:
            return self._launched(inputs, self.buckets.launched(exact))
        self._buffer.send(inputs, shape)
        captured.graph.replay()
        return captured.logits

    def replayed(self, inputs: StepInputs) -> StepShape | None:
        """The captured shape that holds the step; None: it is launched, or its shape was not met yet."""
        shape = self.buckets.fitting(StepShape.of(inputs))
        return None if shape is None or self._captured.get(shape) is None else shape

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._captured.values())

    def capture(self, shapes: Sequence[StepShape]) -> Iterator[StepShape]:
        """Captures shapes, yielding each before its turn."""
        for shape in shapes:
            yield shape
            self._once(shape)

    def _once(self, shape: StepShape) -> Captured | None:
        if shape not in self._captured:
            self._captured[shape] = self._try_capture(shape)
        return self._captured[shape]

    def _try_capture(self, shape: StepShape) -> Captured | None:
        """None where memory is too small: such steps are launched."""
        try:
            return self._capture(shape) if self._can_capture else None
        except (torch.OutOfMemoryError, StepError):
            return None

    def _capture(self, shape: StepShape) -> Captured:
        self._buffer.send(empty_step(), shape)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            try:
                self._rehearsed.run(shape)  # loads kernels and allocates workspaces, which a capture must not
            finally:
                current.wait_stream(self._stream)  # whatever comes next, it fills the buffer that this reads
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = self._launched.run(shape)
            except BaseException:
                try:
                    graph.capture_end()
                except RuntimeError:  # what stopped it is told; torch takes it to go on, so that no other can begin
                    self._can_capture = False
                raise
            graph.capture_end()
        return Captured(graph, _borrowed(logits))


def empty_step() -> StepInputs:
    """A step of one token that is written to no cache."""
    one, start = np.zeros(1, np.int64), np.array([0, 1], np.int32)
    return StepInputs(one, one, one - 1, np.zeros((1, 1), np.int32), start, start[1:], one)


def largest_step(limits: EngineLimits) -> StepShape:
    """As many tokens and sequences as an engine takes. Its block tables are as wide as those of usual steps: for others
    there would be other kernels, and other memory for the parts of contexts."""
    sequences = min(limits.max_num_seqs, limits.max_num_tokens)
    return StepShape(limits.max_num_tokens, sequences, Buckets.of(limits).blocks(sequences)[0], sequences)


class _Borrowed:
    """The CUDA array interface (numba's, version 3) of a tensor's bytes, without owning them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _borrowed(logits: torch.Tensor) -> torch.Tensor:
    """The same memory; that of `logits` goes back to the pool, so that the next graph may use it in its own turn."""
    borrowed = torch.as_tensor(_Borrowed(logits.contiguous()), device=logits.device)
    return borrowed.view(logits.dtype).view(logits.shape)


__all__ = ["GraphedStep", "LaunchedStep", "empty_step", "largest_step"]
