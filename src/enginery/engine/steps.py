"""Running a network's regions: which value goes where is settled once, a step only swaps the batch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from enginery.engine.compile import Run
from enginery.engine.gpu import step_error
from enginery.engine.protocol import StepInputs
from enginery.engine.regions import Outline, Region
from enginery.network import Network, Program, Tensor
from enginery.ops import raised

Step = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Values of the step inputs by name -> logits."""


@dataclass(frozen=True)
class _Call:
    """One region: `arguments` holds weights and pools, `fills` the places that take a value of this step."""

    name: str
    run: Run
    arguments: list[torch.Tensor | None]
    fills: tuple[tuple[int, int], ...]
    results: tuple[int, ...]
    dead: tuple[int, ...]
    """slots of activations that nobody reads afterwards"""


class CompiledStep:
    """All regions of an outline, one after another."""

    def __init__(
        self,
        outline: Outline,
        runs: Mapping[str, Run],
        fixed: Mapping[str, torch.Tensor],
        step_inputs: Sequence[Tensor],
    ) -> None:
        """`fixed` are weights and KV pools by name, `runs` the compiled regions by key."""
        self._slots = {tensor: i for i, tensor in enumerate(step_inputs)}
        self._names = [tensor.name for tensor in step_inputs]
        for region in outline.regions:
            for tensor in region.results:
                self._slots[tensor] = len(self._slots)
        last = {tensor: i for i, region in enumerate(outline.regions) for tensor in region.bindings}
        self._calls = [
            self._call(region, runs[region.key], fixed, [t for t in self._slots if last.get(t) == i])
            for i, region in enumerate(outline.regions)
        ]
        (self._logits,) = (self._slots[t] for region in outline.regions for t in region.results if t.is_output)

    def _call(self, region: Region, run: Run, fixed: Mapping[str, torch.Tensor], dead: Sequence[Tensor]) -> _Call:
        arguments = [None if tensor in self._slots else fixed[tensor.name] for tensor in region.bindings]
        fills = tuple((i, self._slots[tensor]) for i, tensor in enumerate(region.bindings) if tensor in self._slots)
        freed = tuple(self._slots[tensor] for tensor in dead if tensor.parent is not None)
        return _Call(region.name, run, arguments, fills, tuple(self._slots[t] for t in region.results), freed)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values: list[torch.Tensor | None] = [inputs[name] for name in self._names]
        values += [None] * (len(self._slots) - len(values))
        with raised.heard() as errors:
            for call in self._calls:
                for place, slot in call.fills:
                    call.arguments[place] = values[slot]
                try:
                    results = _run(call, errors)
                finally:
                    for place, _ in call.fills:
                        call.arguments[place] = None
                for slot, result in zip(call.results, results, strict=True):
                    values[slot] = result
                for slot in call.dead:
                    values[slot] = None
        logits = values[self._logits]
        assert logits is not None  # noqa: S101  (a region computed it)
        return logits


def _run(call: _Call, errors: list[BaseException]) -> list[torch.Tensor]:
    """Its results. `errors`: what its operators raise; compiled code may go on without theirs."""
    results: list[torch.Tensor] = []
    try:
        results = call.run(call.arguments)  # type: ignore[arg-type]
    except (RuntimeError, MemoryError) as error:
        errors.append(error)
    if not errors:
        return results
    if isinstance(errors[0], Exception):
        raise step_error(f"region {call.name}", errors[0]) from errors[0]
    raise errors[0]


class EagerStep:
    """The whole network by the references of its operators."""

    def __init__(self, network: Network, fixed: Mapping[str, torch.Tensor], step_inputs: Sequence[Tensor]) -> None:
        held = [t for t in (*network.inputs, *network.constants) if t.name in fixed]
        self._names = [tensor.name for tensor in step_inputs]
        self._fixed = [fixed[tensor.name] for tensor in held]
        self._program = Program(network, [*step_inputs, *held], network.outputs)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        try:
            return self._program([*(inputs[name] for name in self._names), *self._fixed])[0]
        except Exception as error:
            raise step_error("the network", error) from error


class HostStep:
    """Runs steps on the CPU, from the arrays as they are."""

    def __init__(self, step: Step, names: Sequence[str]) -> None:
        self._step = step
        self._names = names

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Logits `[≥ L, vocab_size]`."""
        inputs = inputs.resolved()
        values = {name: torch.from_numpy(getattr(inputs, name)) for name in self._names}
        if len(inputs.logits_indices) == 0:  # compiled code wants at least one row: it is computed and dropped
            values["logits_indices"] = torch.tensor([len(inputs.token_ids) - 1])
        return self._step(values)


__all__ = ["CompiledStep", "EagerStep", "HostStep", "Step"]
