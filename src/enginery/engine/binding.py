"""Binding weights: what is known at build time is computed once, tensor by tensor, and the network is left with names.

Layers over constants alone (a fused weight, a packed weight, a rotary table) are expressions. `split` separates them
from the layers that run in every step; `WeightEvaluator` computes their values one at a time, so that the peak is one
expression.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from enginery.errors import BuildError
from enginery.network import Dim, Layer, Network, Tensor, operator_name, signature

Read = Callable[[str], torch.Tensor]
"""Gives the tensor of a checkpoint by name, as a view of the file where that is possible."""


@dataclass(frozen=True)
class Split:
    """`network` runs in every step; `weights` says for each of its constants which tensor of the source it is."""

    network: Network
    weights: dict[str, Tensor]


def split(source: Network) -> Split:
    """Separates what is computed once from what is computed in every step. The source stays as it is."""
    known = _known(source)
    live = [layer for layer in source if not any(output in known for output in layer.outputs)]
    wanted = dict.fromkeys(t for layer in live for t in layer.inputs if t in known)
    wanted.update(dict.fromkeys(t for t in source.outputs if t in known))
    network = Network()
    network.ranges.update(source.ranges)
    twins = {t: network.add_input(t.name, t.shape, t.dtype) for t in source.inputs}
    weights: dict[str, Tensor] = {}
    for tensor in wanted:
        twins[tensor] = network.add_constant(tensor.name.replace("#", "."), tensor.shape, tensor.dtype)
        weights[twins[tensor].name] = tensor

    def twin(value: Any) -> Any:
        if isinstance(value, Tensor):
            return twins[value]
        return tuple(map(twin, value)) if isinstance(value, tuple) else value

    for layer in live:
        with network.inserting_before(None, module_path=layer.module_path, provenance=layer.provenance):
            types = [(output.shape, output.dtype) for output in layer.outputs]
            added = network.add_layer(layer.op, tuple(map(twin, layer.args)), name=layer.name, types=types)
        twins.update(zip(layer.outputs, added.outputs, strict=True))
    for name, tensor in zip(source.output_names, source.outputs, strict=True):
        network.set_output(name, twins[tensor])
    return Split(network, weights)


def _known(network: Network) -> set[Tensor]:
    """Constants, and what follows from them without a symbolic size."""
    known = set(network.constants)
    for layer in network:
        if layer.is_constant and known.issuperset(layer.inputs) and not any(map(_is_symbolic, layer.args)):
            known.update(layer.outputs)
    return known


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, Dim) or (isinstance(value, tuple) and any(map(_is_symbolic, value)))


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor whose shape is known."""
    count = tensor.dtype.itemsize
    for size in tensor.shape:
        count *= int(size)  # type: ignore[arg-type]
    return count


class WeightEvaluator:
    """Computes weights, each once: `value(weight)` for every weight of a split, in any order.

    Intermediate values and checkpoint tensors are let go when their last reader has run.
    """

    def __init__(self, source: Network, weights: Iterable[Tensor], read: Read) -> None:
        self._source = source
        self._read = read
        self._values: dict[Tensor, torch.Tensor] = {}
        self._readers: Counter[Tensor] = Counter()
        pending = list(weights)
        self._readers.update(pending)
        seen: set[Layer] = set()
        while pending:
            parent = pending.pop().parent
            if parent is not None and parent not in seen:
                seen.add(parent)
                self._readers.update(parent.inputs)
                pending.extend(parent.inputs)

    @torch.inference_mode()
    def value(self, weight: Tensor) -> torch.Tensor:
        """The weight's value, contiguous. Raises BuildError that names the tensor or the layer that failed."""
        self._compute(weight)
        return self._take(weight).contiguous()

    def _compute(self, tensor: Tensor) -> None:
        if tensor in self._values:
            return
        if tensor.parent is None:
            self._values[tensor] = self._load(tensor)
            return
        layer = tensor.parent
        for source in layer.inputs:
            self._compute(source)
        results = self._run(layer, {source: self._values[source] for source in layer.inputs})
        for source in layer.inputs:
            self._take(source)
        self._values.update(
            (out, value) for out, value in zip(layer.outputs, results, strict=True) if self._readers[out]
        )

    def _take(self, tensor: Tensor) -> torch.Tensor:
        """The value, forgotten here if nobody else will read it."""
        self._readers[tensor] -= 1
        return self._values[tensor] if self._readers[tensor] > 0 else self._values.pop(tensor)

    def _load(self, tensor: Tensor) -> torch.Tensor:
        value = self._source.values.get(tensor.name)
        if value is None:
            value = self._read(tensor.name)
        if tuple(value.shape) != tensor.shape:
            raise BuildError(
                f"weight {tensor.name} has shape {list(value.shape)} where the network has {list(tensor.shape)}"
            )
        return value.to(tensor.dtype)

    def _run(self, layer: Layer, values: Mapping[Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        known = signature(layer.op)
        filled = [_fill(value, values) for value in layer.args]
        args = [value for i, value in enumerate(filled) if i not in known.keyword_only]
        named = {known.names[i]: filled[i] for i in known.keyword_only}
        try:
            result = layer.op(*args, **named)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BuildError(f"weight expression {layer.name} ({operator_name(layer.op)}) failed: {line}") from error
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _fill(value: Any, values: Mapping[Tensor, torch.Tensor]) -> Any:
    """An argument with tensors in the place of their names. No closure: its cycle would keep the tensors alive."""
    if isinstance(value, Tensor):
        return values[value]
    return [_fill(item, values) for item in value] if isinstance(value, tuple) else value


__all__ = ["Read", "Split", "WeightEvaluator", "nbytes", "split"]
