"""Outlining: the network is cut into regions so that a repeated layer is compiled once.

    prologue    what comes before the layers (embedding, rotary tables)
    block 0..   one per repeated layer; all that are equal share one compilation
    epilogue    what comes after them (gather, norm, head)

A region is a network of its own, whose inputs are the values that reach it from outside: weights, KV pools, tables of
the batch, and activations of earlier regions. Two regions are equal if their networks have the same text; inputs are
named by their place in the layer, not by the layer's number, so that the texts of repeated layers agree. What stands
for each input is the region's bindings.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from enginery.network import Dim, Layer, Network, Tensor
from enginery.network.dim import symbols_of

_NUMBERED_PART = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_CACHE = re.compile(r"(key_cache|value_cache)\.\d+\Z")


@dataclass(frozen=True)
class Region:
    """A piece of a network. `bindings[i]` is the tensor of the whole network behind input i, `results[i]` that of
    output i.
    """

    name: str
    network: Network
    bindings: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    key: str
    """equal for regions whose networks are equal"""

    def __str__(self) -> str:
        pairs = zip(self.network.inputs, self.bindings, strict=True)
        lines = [f"# {self.name}, {self.key[:16]}", *(f"# {inner.name} = {outer.name}" for inner, outer in pairs)]
        return "\n".join([*lines, str(self.network)])


@dataclass(frozen=True)
class Outline:
    """The regions in execution order."""

    regions: tuple[Region, ...]

    @property
    def distinct(self) -> dict[str, Region]:
        """The first region of each key."""
        found: dict[str, Region] = {}
        for region in self.regions:
            found.setdefault(region.key, region)
        return found

    def folded(self) -> Outline:
        """The distinct regions alone, as a step that can be run: what a region gives that is left out, its equal gives.

        It calls every operator that the whole calls, on tensors of the same shapes and strides.
        """
        distinct = self.distinct
        given = {
            tensor: result
            for region in self.regions
            for tensor, result in zip(region.results, distinct[region.key].results, strict=True)
        }
        return Outline(
            tuple(
                replace(region, bindings=tuple(given.get(tensor, tensor) for tensor in region.bindings))
                for region in distinct.values()
            )
        )

    def __str__(self) -> str:
        counts = Counter(region.key for region in self.regions)
        lines = [
            f"{region.name}: {counts[key]} × {len(region.network)} layers" for key, region in self.distinct.items()
        ]
        return "\n".join(lines)


def outline(network: Network) -> Outline:
    """Cuts a bound network. One region if nothing repeats, or if the cut would reorder writes to a KV pool."""
    layers = list(network)
    paths = _repeated(layers)
    groups = _assign(layers, paths) if paths is not None else [0] * len(layers)
    if not _keeps_effects(layers, groups):
        paths, groups = None, [0] * len(layers)
    numbers = sorted(set(groups))
    members = {number: [] for number in numbers}  # type: dict[int, list[Layer]]
    for layer, group in zip(layers, groups, strict=True):
        members[group].append(layer)
    last = numbers[-1] if numbers else 0
    wanted = _results(network, dict(zip(layers, groups, strict=True)))
    return Outline(
        tuple(
            extract(network, members[number], wanted[number], _name(number, last, paths), paths) for number in numbers
        )
    )


@dataclass(frozen=True)
class _Container:
    """The module list that repeats, such as `model.layers`, and how many entries it has."""

    path: str
    count: int

    def index(self, module_path: str) -> int | None:
        """The entry that a module lies in."""
        if not module_path.startswith(self.path):
            return None
        match = _NUMBERED_PART.match(module_path, len(self.path))
        return int(match[1]) if match else None


def _repeated(layers: Sequence[Layer]) -> _Container | None:
    """The outermost numbered module list with the most entries; None if none has two."""
    entries: dict[str, set[int]] = {}
    for layer in layers:
        match = _NUMBERED_PART.search(layer.module_path)
        if match:
            entries.setdefault(layer.module_path[: match.start()], set()).add(int(match[1]))
    path = max(entries, key=lambda path: len(entries[path]), default=None)
    if path is None or len(entries[path]) < 2:
        return None
    return _Container(path, max(entries[path]) + 1)


def _assign(layers: Sequence[Layer], container: _Container) -> list[int]:
    """A group for each layer: 0 before the blocks, 1 + i for block i, count + 1 behind them.

    A layer goes no earlier than its inputs. One of no block goes as early as it can, or behind the blocks if it stands
    there.
    """
    indices = [container.index(layer.module_path) for layer in layers]
    end = max(i for i, index in enumerate(indices) if index is not None)
    groups: list[int] = []
    place: dict[Tensor, int] = {}
    for i, (layer, index) in enumerate(zip(layers, indices, strict=True)):
        earliest = max((place.get(tensor, 0) for tensor in layer.inputs), default=0)
        if index is not None:
            group = max(earliest, index + 1)
        elif i > end and earliest > 0:
            group = container.count + 1
        else:
            group = earliest
        groups.append(group)
        place.update(dict.fromkeys(layer.outputs, group))
    return groups


def _keeps_effects(layers: Sequence[Layer], groups: Sequence[int]) -> bool:
    """Layers that share an input which one of them writes stay in their order."""
    written = {tensor for layer in layers if layer.has_effects for tensor in layer.inputs if tensor.is_input}
    latest: dict[Tensor, int] = {}
    for layer, group in zip(layers, groups, strict=True):
        for tensor in layer.inputs:
            if _CACHE.match(tensor.name) and tensor in written:
                if group < latest.get(tensor, 0):
                    return False
                latest[tensor] = group
    return True


def _results(network: Network, groups: Mapping[Layer, int]) -> dict[int, list[Tensor]]:
    """The values of each group that another group or the caller reads, in execution order."""
    results: dict[int, list[Tensor]] = {group: [] for group in set(groups.values())}
    for layer, group in groups.items():
        for output in layer.outputs:
            if output.is_output or any(groups[user] != group for user in output.users):
                results[group].append(output)
    return results


def _name(number: int, last: int, container: _Container | None) -> str:
    if container is None:
        return "network"
    if number == 0:
        return "prologue"
    return f"{container.path}.{number - 1}" if number <= container.count else "epilogue"


def extract(
    network: Network, layers: Sequence[Layer], results: Sequence[Tensor], name: str, container: _Container | None = None
) -> Region:
    """The given layers as a network of their own. Names in it do not depend on where in the network they stood."""
    inner = Network()
    inner.ranges.update(_ranges(network, layers))
    bindings = _outside(network, layers)
    twins: dict[Tensor, Tensor] = {}
    for tensor in bindings:
        twins[tensor] = inner.add_input(_claim(inner, _local_name(tensor)), tensor.shape, tensor.dtype)

    def twin(value: Any) -> Any:
        if isinstance(value, Tensor):
            return twins[value]
        return tuple(map(twin, value)) if isinstance(value, tuple) else value

    for layer in layers:
        with inner.inserting_before(None, module_path=_local_path(layer.module_path, container)):
            types = [(output.shape, output.dtype) for output in layer.outputs]
            added = inner.add_layer(layer.op, tuple(map(twin, layer.args)), types=types)
        twins.update(zip(layer.outputs, added.outputs, strict=True))
    for number, tensor in enumerate(results):
        inner.set_output(f"result{number}", twins[tensor])
    key = hashlib.sha256(str(inner).encode()).hexdigest()
    return Region(name, inner, bindings, tuple(results), key)


def _outside(network: Network, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The values that the layers read from elsewhere, in the order of first use, and inputs that give missing sizes."""
    own = {output for layer in layers for output in layer.outputs}
    found = dict.fromkeys(tensor for layer in layers for tensor in layer.inputs if tensor not in own)
    given = {size.name for tensor in found for size in tensor.shape if isinstance(size, Dim)}
    for symbol in sorted(_symbols(layers) - given):
        source = next(
            (t for t in network.inputs if any(isinstance(s, Dim) and s.name == symbol for s in t.shape)), None
        )
        if source is not None:
            found.setdefault(source)
    return tuple(found)


def _symbols(layers: Iterable[Layer]) -> frozenset[str]:
    """The symbolic sizes that the layers' arguments and results have."""
    found: set[str] = set()
    for layer in layers:
        for output in layer.outputs:
            found |= symbols_of(output.shape)
        for value in layer.args:
            found |= _symbols_in(value)
    return frozenset(found)


def _symbols_in(value: Any) -> frozenset[str]:
    if isinstance(value, Dim):
        return value.symbols
    return frozenset().union(*map(_symbols_in, value)) if isinstance(value, tuple) else frozenset()


def _ranges(network: Network, layers: Sequence[Layer]) -> dict[str, tuple[int, int | None]]:
    used = _symbols(layers) | symbols_of(size for layer in layers for t in layer.inputs for size in t.shape)
    return {symbol: bounds for symbol, bounds in network.ranges.items() if symbol in used}


def _local_name(tensor: Tensor) -> str:
    """A name that is the same in every block: `w` of a weight, `x` of an activation, its kind of a pool."""
    if tensor.is_input:
        match = _CACHE.match(tensor.name)
        return match[1] if match else tensor.name
    return "w" if tensor.parent is None else "x"


def _local_path(path: str, container: _Container | None) -> str:
    """The module path below its block."""
    if container is None or container.index(path) is None:
        return path
    match = _NUMBERED_PART.match(path, len(container.path))
    return path[match.end() :].lstrip(".") if match else path


def _claim(network: Network, name: str) -> str:
    """`name`, numbered if the network has it."""
    taken = {tensor.name for tensor in network.inputs}
    if name not in taken:
        return name
    return next(candidate for number in range(1, len(taken) + 2) if (candidate := f"{name}_{number}") not in taken)


__all__ = ["Outline", "Region", "extract", "outline"]
