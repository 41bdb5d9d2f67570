"""Whole-network operations: copying and dropping what nobody reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enginery.network.collection import paused_collection
from enginery.network.layer import Layer
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    from enginery.network.network import Network


def copy_into(source: Network, target: Network) -> None:
    """Fills an empty network with the same inputs, constants, layers and outputs; constants' values are shared."""
    with paused_collection():
        _copy(source, target)


def _copy(source: Network, target: Network) -> None:
    twins: dict[Tensor, Tensor] = {}

    def twin(value: Any) -> Any:
        if type(value) is Tensor:
            return twins[value]
        return tuple(map(twin, value)) if type(value) is tuple else value

    for tensor in source.inputs:
        twins[tensor] = target.add_input(tensor.name, tensor.shape, tensor.dtype)
    for tensor in source.constants:
        twins[tensor] = target.add_constant(tensor.name, tensor.shape, tensor.dtype, source.values.get(tensor.name))
    for layer in source:
        types = [(output.shape, output.dtype) for output in layer.outputs]
        added = target.add_layer(layer.op, tuple(map(twin, layer.args)), name=layer.name, types=types)
        added.module_path = layer.module_path
        added.provenance = layer.provenance
        twins.update(zip(layer.outputs, added.outputs, strict=True))
    for name, tensor in zip(source.output_names, source.outputs, strict=True):
        target.set_output(name, twins[tensor])
    target.ranges.update(source.ranges)


def prune(network: Network) -> int:
    """Erases the layers that nobody reads and that have no effect, from the end on; gives their number."""
    erased = 0
    layer: Layer | None = network._last
    while layer is not None:
        previous = layer._previous
        if not layer.has_effects and not any(output._uses or output.output_names for output in layer.outputs):
            network.erase(layer)
            erased += 1
        layer = previous
    return erased
