"""Runs a network by the references of its operators, one layer after another: slow, correct, the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from enginery import ops
from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size
from enginery.network.layer import Layer, tensors_in
from enginery.network.operator import operator_name, signature
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    from enginery.network.network import Network

Build = Callable[[list, Mapping[str, int]], Any]


class Step(NamedTuple):
    """One call: `template` holds literals, `fills` the places of tensors, `builds` makes lists and symbolic sizes."""

    function: Callable
    template: list
    fills: tuple[tuple[int, int], ...]
    builds: tuple[tuple[int, Build], ...]
    names: tuple[str, ...]
    """of the last arguments, those that are passed by name"""
    needs_device: bool
    outputs: tuple[int, ...]
    single: bool
    dead: tuple[int, ...]
    """slots that nobody reads afterwards"""
    layer: Layer


class Program:
    """A sequence of layers made ready to run many times: `program(values) -> results`.

    `feeds` are the tensors whose values are given, in the order of `values`; `results` those whose values are wanted.
    A value is dropped when its last reader has run. A Program does not follow later changes of the network.
    """

    def __init__(self, layers: Iterable[Layer], feeds: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        self.feeds = tuple(feeds)
        self._slots: dict[Tensor, int] = {tensor: i for i, tensor in enumerate(self.feeds)}
        layers = list(layers)
        last = {tensor: i for i, layer in enumerate(layers) for tensor in tensors_in(layer.args)}
        kept = set(results)
        self._steps = [self._step(layer, i, last, kept) for i, layer in enumerate(layers)]
        self._results = [self._slot(tensor, "the results") for tensor in results]
        self._spare = len(self._slots) - len(self.feeds)

    def __call__(
        self,
        values: Sequence[torch.Tensor],
        symbols: Mapping[str, int] | None = None,
        device: torch.device | None = None,
    ) -> list[torch.Tensor]:
        """`symbols` gives the symbolic sizes (default: from the values' shapes), `device` the place of new tensors."""
        if symbols is None:
            symbols = bind_symbols(self.feeds, values)
        if device is None:
            device = values[0].device if values else torch.device("cpu")
        slots: list[Any] = [*values, *[None] * self._spare]
        for function, template, fills, builds, names, needs_device, outputs, single, dead, layer in self._steps:
            args = template.copy()
            for place, slot in fills:
                args[place] = slots[slot]
            for place, build in builds:
                args[place] = build(slots, symbols)
            try:
                if names or needs_device:
                    count = len(args) - len(names)
                    named = dict(zip(names, args[count:], strict=True))
                    if needs_device:
                        named["device"] = device
                    result = function(*args[:count], **named)
                else:
                    result = function(*args)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise NetworkError(f"layer {layer.name} ({operator_name(layer.op)}) failed: {_line(error)}") from error
            if single:
                slots[outputs[0]] = result
            else:
                for slot, value in zip(outputs, () if result is None else result, strict=True):
                    slots[slot] = value
            for slot in dead:
                slots[slot] = None
        return [slots[slot] for slot in self._results]

    def _slot(self, tensor: Tensor, reader: str) -> int:
        slot = self._slots.get(tensor)
        if slot is None:
            raise NetworkError(f"{reader} read {tensor.name} before it is computed")
        return slot

    def _step(self, layer: Layer, index: int, last: Mapping[Tensor, int], kept: set[Tensor]) -> Step:
        known = signature(layer.op)
        template: list[Any] = []
        fills: list[tuple[int, int]] = []
        builds: list[tuple[int, Build]] = []
        names: list[str] = []
        for i, value in enumerate(layer.args):
            if i in known.keyword_only:
                if value == known.defaults[i]:
                    continue
                names.append(known.names[i])
            place = len(template)
            if type(value) is Tensor:
                fills.append((place, self._slot(value, f"layer {layer.name}")))
            elif _is_dynamic(value):
                builds.append((place, self._builder(value, layer)))
            template.append(list(value) if isinstance(value, tuple) else value)
        inputs = layer.inputs
        for output in layer.outputs:
            self._slots[output] = len(self._slots)
        dead = {
            tensor for tensor in inputs if last[tensor] == index and tensor not in kept and tensor.parent is not None
        }
        dead |= {tensor for tensor in layer.outputs if tensor not in last and tensor not in kept}
        return Step(
            ops.reference(layer.op), template, tuple(fills), tuple(builds), tuple(names),
            "device" in known.index and not inputs, tuple(self._slots[output] for output in layer.outputs),
            known.is_single, tuple(self._slots[tensor] for tensor in dead), layer,
        )  # fmt: skip

    def _builder(self, value: Any, layer: Layer) -> Build:
        if type(value) is Tensor:
            slot = self._slot(value, f"layer {layer.name}")
            return lambda slots, symbols: slots[slot]
        if isinstance(value, Dim):
            return lambda slots, symbols: value.substitute(symbols)
        if isinstance(value, tuple):
            parts = [self._builder(item, layer) for item in value]
            return lambda slots, symbols: [part(slots, symbols) for part in parts]
        return lambda slots, symbols: value


def run(
    network: Network, inputs: Sequence[torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The outputs for inputs in the network's order; `constants` by name, those in `network.values` may be left out."""
    names = [tensor.name for tensor in network.inputs]
    if len(inputs) != len(names):
        raise NetworkError(f"{len(inputs)} inputs given, the network has {len(names)}: {', '.join(names)}")
    missing = [
        t.name for t in network.constants if t.name not in constants and t.name not in network.values and t._uses
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise NetworkError(f"constant {missing[0]}{more} has no value", "Give the weights by name")
    needed = [t for t in network.constants if t._uses or t.is_output]
    data = [constants[t.name] if t.name in constants else network.values[t.name] for t in needed]
    feeds = [*network.inputs, *needed]
    return tuple(Program(network, feeds, network.outputs)([*inputs, *data]))


def bind_symbols(tensors: Sequence[Tensor], values: Sequence[torch.Tensor]) -> dict[str, int]:
    """The symbolic sizes that the values' shapes say. Raises NetworkError if a shape or dtype is not as declared."""
    symbols: dict[str, int] = {}
    later: list[tuple[Tensor, int, Size, int]] = []
    for tensor, value in zip(tensors, values, strict=True):
        if value.dtype != tensor.dtype:
            raise NetworkError(f"{tensor!r} got a value of dtype {str(value.dtype).removeprefix('torch.')}")
        if len(value.shape) != len(tensor.shape):
            raise NetworkError(f"{tensor!r} got a value of shape {list(value.shape)}")
        for axis, (size, actual) in enumerate(zip(tensor.shape, value.shape, strict=True)):
            if isinstance(size, int):
                if size != actual:
                    raise NetworkError(f"{tensor!r} got a value of shape {list(value.shape)}")
            elif (name := size.name) is not None:
                if symbols.setdefault(name, actual) != actual:
                    raise NetworkError(
                        f"{tensor!r} got a value of shape {list(value.shape)}, but {name} is {symbols[name]}"
                    )
            else:
                later.append((tensor, axis, size, actual))
    for tensor, axis, size, actual in later:
        expected = size.substitute(symbols) if isinstance(size, Dim) else size
        if isinstance(expected, int) and expected != actual:
            raise NetworkError(f"{tensor!r} got {actual} in dimension {axis} where {size} is {expected}")
    return symbols


def _is_dynamic(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_dynamic, value))
    return type(value) is Tensor or isinstance(value, Dim)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
