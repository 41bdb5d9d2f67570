"""What every network obeys, as a table of checks: each takes a network and yields what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size, symbols_of
from enginery.network.layer import Layer, base_of, inputs_of, tensors_in
from enginery.network.operator import Operator, operator_name, signature
from enginery.network.shapes.sizes import show
from enginery.network.tensor import Tensor
from enginery.network.types import infer_types

if TYPE_CHECKING:
    from enginery.network.network import Network

Types = Sequence[tuple[tuple[Size, ...], torch.dtype]]
Complaints = Iterator[str]


class Check(NamedTuple):
    name: str
    complaints: Callable[[Network], Complaints]


def verify(network: Network) -> None:
    """Raises NetworkError with the first thing that is wrong, naming the layer; returns if nothing is."""
    for check in CHECKS:
        for complaint in check.complaints(network):
            raise NetworkError(f"{complaint} [{check.name}]")


def _links(network: Network) -> Complaints:
    """The chain of layers holds each layer once, in the order of the numbers."""
    previous: Layer | None = None
    count = 0
    layer = network._first
    while layer is not None:
        if layer._previous is not previous or (previous is not None and previous.order >= layer.order):
            yield f"layer {layer.name} is not where the chain of layers says"
        if layer.is_removed or layer.network is not network:
            yield f"layer {layer.name} is removed or of another network"
        count += 1
        if count > len(network):
            yield "the chain of layers holds more than the network's layers"
            return
        previous, layer = layer, layer._next
    if count != len(network) or network._last is not previous:
        yield f"the chain holds {count} layers, the network {len(network)}"


def _names(network: Network) -> Complaints:
    seen = {*network._inputs, *network._constants}
    if len(seen) != len(network._inputs) + len(network._constants):
        yield "an input and a constant have one name"
    for key, layer in network._layers.items():
        if layer.name != key:
            yield f"layer {layer.name} is known as {key}"
        if key in seen:
            yield f"layer {key} has the name of an input or a constant"
        labels = [key] if len(layer.outputs) == 1 else [f"{key}#{i}" for i in range(len(layer.outputs))]
        if [output.name for output in layer.outputs] != labels:
            yield f"the outputs of layer {key} are not named after it"


def _definitions(network: Network) -> Complaints:
    """Every value is computed before it is read, by a layer of this network."""
    defined: set[Tensor] = {*network.inputs, *network.constants}
    for layer in network:
        for tensor in inputs_of(layer._args):
            if tensor not in defined:
                yield f"layer {layer.name} reads {tensor.name} before it is computed"
        for index, output in enumerate(layer.outputs):
            if output.parent is not layer or output.index != index or output.network is not network:
                yield f"output {index} of layer {layer.name} belongs elsewhere"
        defined.update(layer.outputs)
    for name, tensor in network._outputs.items():
        if tensor not in defined:
            yield f"output {name} reads {tensor.name}, which is not computed"


_NOBODY: Mapping[Layer, int] = {}


def _uses(network: Network) -> Complaints:
    """The use-lists say what the arguments say."""
    counted: dict[Tensor, dict[Layer, int]] = {}
    for layer in network:
        inputs = inputs_of(layer._args)
        if inputs != layer._inputs:
            yield f"the inputs of layer {layer.name} are not those of its arguments"
        for tensor in inputs:
            uses = counted.get(tensor)
            if uses is None:
                uses = counted[tensor] = {}
            uses[layer] = uses[layer] + 1 if layer in uses else 1
    outputs: dict[Tensor, list[str]] = {}
    for name, tensor in network._outputs.items():
        outputs.setdefault(tensor, []).append(name)
    for tensor in _values(network):
        if tensor._uses != counted.get(tensor, _NOBODY):
            yield f"the users of {tensor.name} are not those that read it"
        names = outputs.get(tensor, ())
        if (names or tensor.output_names) and sorted(names) != sorted(tensor.output_names):
            yield f"{tensor.name} is recorded as output {list(tensor.output_names)}, but is {list(names)}"


def _constness(network: Network) -> Complaints:
    for layer in network:
        constant = layer._derives_constant()
        for output in layer.outputs:
            if output.is_constant != constant:
                yield f"layer {layer.name} is {'' if constant else 'not '}known at build time, but recorded otherwise"


def _schemas(network: Network) -> Complaints:
    for layer in network:
        try:
            check_arguments(layer.op, layer.args)
        except NetworkError as error:
            yield f"layer {layer.name}: {error.cause}"


def _types(network: Network) -> Complaints:
    for layer in network:
        stated = tuple([(output.shape, output.dtype) for output in layer.outputs])
        try:
            inferred = infer_types(layer.op, layer.args)
            if tuple(inferred) != stated:
                check_types(stated, inferred, network.ranges)
        except NetworkError as error:
            yield f"layer {layer.name}: {error.cause}"


def _symbols(network: Network) -> Complaints:
    """Every symbolic size can be read off the shape of an input."""
    known = {size.name for tensor in network.inputs for size in tensor.shape if isinstance(size, Dim)} | {None}
    for tensor in (*network.inputs, *network.constants):
        for symbol in symbols_of(tensor.shape) - known:
            yield f"{tensor.name} has the size {symbol}, which no input gives"
    sound: set[Dim] = set()
    for layer in network:
        for size in _sizes_in(layer.args):
            if size not in sound:
                for symbol in size.symbols - known:
                    yield f"layer {layer.name} reads the size {symbol}, which no input gives"
                sound.add(size)


def _writes(network: Network) -> Complaints:
    """Only our own operators write, and only to inputs or views of them: other values of a network do not change."""
    for layer in network:
        for place in signature(layer.op).written:
            for tensor in tensors_in(layer.args[place]):
                if not base_of(tensor).is_input:
                    yield f"layer {layer.name} writes to {tensor.name}, which is no input"


CHECKS = (
    Check("links", _links),
    Check("names", _names),
    Check("definitions", _definitions),
    Check("uses", _uses),
    Check("schemas", _schemas),
    Check("constness", _constness),
    Check("symbols", _symbols),
    Check("types", _types),
    Check("writes", _writes),
)


def _values(network: Network) -> Iterator[Tensor]:
    yield from network.inputs
    yield from network.constants
    for layer in network:
        yield from layer.outputs


def _sizes_in(values: tuple) -> Iterator[Dim]:
    for value in values:
        if value.__class__ is Dim:
            yield value
        elif value.__class__ is tuple:
            yield from _sizes_in(value)


def check_arguments(op: Operator, args: tuple) -> None:
    """Raises NetworkError unless there is a value of the right kind for each argument of the schema."""
    problem = _problem(op, tuple([type(value) if type(value) is not tuple else _kinds(value) for value in args]))
    if problem:
        raise NetworkError(f"{operator_name(op)}: {problem}")


def _kinds(value: tuple) -> frozenset:
    return frozenset([type(item) if type(item) is not tuple else tuple for item in value])


@cache
def _problem(op: Operator, kinds: tuple) -> str:
    known = signature(op)
    if len(kinds) != len(known.names):
        return f"{len(kinds)} arguments where the schema has {len(known.names)}"
    for name, text, kind in zip(known.names, known.types, kinds, strict=True):
        if not _fits(kind, text):
            given = "a list" if isinstance(kind, frozenset) else getattr(kind, "__name__", str(kind))
            return f"argument {name!r} takes {text}, not {given}"
    return ""


def _fits(kind: Any, text: str) -> bool:
    if text.startswith("Optional["):
        return kind is type(None) or _fits(kind, text[9:-1])
    if text.startswith("List["):
        return isinstance(kind, frozenset) and all(_fits(item, text[5:-1]) for item in kind)
    return kind in _KINDS.get(text, ())


_KINDS: Mapping[str, tuple[type, ...]] = {
    "Tensor": (Tensor, int, float, bool, Dim),
    "int": (int, Dim, bool),
    "number": (int, float, bool, Dim, complex),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "Device": (torch.device,),
    "MemoryFormat": (torch.memory_format,),
}


def check_types(stated: Types, inferred: Types, ranges: Mapping[str, tuple[int, int | None]]) -> None:
    """Raises NetworkError unless the types agree. Sizes of two forms agree if they are equal over the symbols' ranges.

    That is tried on 16 draws, the ends of the ranges first.
    """
    for (shape, dtype), (true_shape, true_dtype) in zip(stated, inferred, strict=False):
        if dtype != true_dtype or len(shape) != len(true_shape):
            break
        if shape != true_shape and not all(_agree(a, b, ranges) for a, b in zip(shape, true_shape, strict=True)):
            break
    else:
        if len(stated) == len(inferred):
            return
    raise NetworkError(f"the type is stated as {_show(stated)}, but is {_show(inferred)}")


def _agree(left: Size, right: Size, ranges: Mapping[str, tuple[int, int | None]]) -> bool:
    if left == right:
        return True
    symbols = sorted(symbols_of((left, right)))
    bounds = [ranges.get(symbol, (1, None)) for symbol in symbols]
    random = Random(0)
    for draw in range(16):
        limits = [(low, low + 4096 if high is None else high) for low, high in bounds]
        picks = [pair[draw] if draw < 2 else random.randint(*pair) for pair in limits]
        values: dict[str, Size] = dict(zip(symbols, picks, strict=True))
        sizes = [size.substitute(values) if isinstance(size, Dim) else size for size in (left, right)]
        if sizes[0] != sizes[1]:
            return False
    return bool(symbols)


def _show(types: Types) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{show(shape)}" for shape, dtype in types) or "nothing"
