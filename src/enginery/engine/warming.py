"""Our kernels for the usual steps, compiled, and products measured, while the compilers of the regions run.

A Triton kernel is compiled when it is first called, once for each set of dtypes, alignments and constants: dozens for
the shapes that are captured, one after another. The process that will capture them has to wait for the regions anyway;
meanwhile it runs them by their operators, on empty steps of these shapes. The algorithms that matrix products have to
choose from are measured in these steps, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from enginery import ops
from enginery.engine.buckets import MAX_TOKENS, Buckets
from enginery.engine.graphs import empty_step, largest_step
from enginery.engine.inputs import InputBuffer, StepShape, gathered
from enginery.engine.memory import MemoryPlan
from enginery.engine.protocol import NETWORK_INPUTS, EngineLimits
from enginery.engine.regions import Outline
from enginery.kernels.table import TABLE
from enginery.network import Tensor
from enginery.network.dim import evaluate

LARGE_BY = 1024
"""Tokens between steps that are too large to be captured: others take the algorithms of the next larger one."""

Values = Mapping[str, torch.Tensor]


def warm(outline: Outline, plan: MemoryPlan) -> None:
    """Runs steps that are too large to be captured, and those that are captured when an engine opens, over zeros.

    Never fails: what does not run here fails where it matters, and is told there. Does nothing where the zeros need
    more memory than the KV cache, in whose place they are.
    """
    with suppress(Exception), TABLE.measuring(plan.device):
        _run_usual_steps(outline, plan)
    torch.cuda.empty_cache()


@torch.no_grad()
def _run_usual_steps(outline: Outline, plan: MemoryPlan) -> None:
    device = torch.device(plan.device)
    buffer = InputBuffer(plan.limits, device)
    shapes = (*_large_steps(plan.limits), *Buckets.of(plan.limits).at_open())
    kinds = _fixed(outline)
    if sum(math.prod(shape) * dtype.itemsize for shape, dtype in set(kinds.values())) > plan.kv_cache:
        return
    zeros = {kind: torch.zeros(kind[0], dtype=kind[1], device=device) for kind in set(kinds.values())}
    step = OperatorStep(outline.folded(), {name: zeros[kind] for name, kind in kinds.items()}, device)
    for shape in shapes:
        buffer.send(empty_step(), shape)
        with suppress(torch.OutOfMemoryError):  # a smaller one may fit
            ops.greatest(step(gathered(buffer.views(shape))))  # which a sampler asks for first


def _large_steps(limits: EngineLimits) -> Iterator[StepShape]:
    """The largest first."""
    largest = largest_step(limits)
    yield largest
    for tokens in range(largest.tokens - LARGE_BY, MAX_TOKENS, -LARGE_BY):
        yield replace(largest, tokens=tokens)


def _fixed(outline: Outline) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the weights and KV pools that the distinct regions read; a pool has one block."""
    read = {tensor.name: tensor for region in outline.distinct.values() for tensor in region.bindings}
    return {
        name: (tuple(evaluate(size, {"num_blocks": 1}) for size in tensor.shape), tensor.dtype)
        for name, tensor in read.items()
        if tensor.parent is None and name not in NETWORK_INPUTS
    }


class OperatorStep:
    """A step by its operators."""

    def __init__(self, outline: Outline, fixed: Values, device: torch.device) -> None:
        """`fixed` are weights and KV pools by name."""
        self._fixed = fixed
        self._calls = [(region, region.network.to_graph_module(device)) for region in outline.regions]

    def __call__(self, inputs: Values) -> torch.Tensor:
        """Logits."""
        results: dict[Tensor, torch.Tensor] = {}

        def value_of(tensor: Tensor) -> torch.Tensor:
            if tensor in results:
                return results[tensor]
            return inputs[tensor.name] if tensor.name in inputs else self._fixed[tensor.name]

        for region, run in self._calls:
            given = run(*map(value_of, region.bindings))
            # As compiled regions give them.
            results.update((tensor, value.contiguous()) for tensor, value in zip(region.results, given, strict=True))
        (logits,) = (value for tensor, value in results.items() if tensor.is_output)
        return logits


__all__ = ["OperatorStep", "warm"]
