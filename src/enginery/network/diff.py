"""What differs between two networks, layer by layer.

A layer that merely reads a replaced value under its new name is not a difference: only layers that went, came, or do
something else are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from enginery.network.layer import Layer, tensors_in
from enginery.network.tensor import Tensor
from enginery.network.text import label, layer_text, reference, same_value, type_text

if TYPE_CHECKING:
    from enginery.network.network import Network


def diff(old: Network, new: Network) -> str:
    """Lines with `-` (only in old), `+` (only in new) and a head that counts them; empty if the networks do the same
    calls.

    Lines that belong together stand together: what came is shown where it stands in the new network, after what went
    there.
    """
    lines = [*_values(old, new), *_layers(old, new), *_outputs(old, new)]
    if not lines:
        return ""
    gone, come = (sum(line.startswith(mark) for line in lines) for mark in "-+")
    return "\n".join([f"{len(old)} -> {len(new)} layers, -{gone} +{come}", *lines]) + "\n"


def _values(old: Network, new: Network) -> Iterator[str]:
    for kind, left, right in (
        ("input", old._inputs, new._inputs),
        ("constant", old._constants, new._constants),
    ):
        before, after = (
            {name: f"{kind} {reference(t)}: {type_text(t)}" for name, t in table.items()} for table in (left, right)
        )
        yield from (f"- {line}" for name, line in before.items() if after.get(name) != line)
        yield from (f"+ {line}" for name, line in after.items() if before.get(name) != line)


def _outputs(old: Network, new: Network) -> Iterator[str]:
    for name in dict.fromkeys((*old.output_names, *new.output_names)):
        left, right = old._outputs.get(name), new._outputs.get(name)
        if left is None or right is None or not _corresponds(left, right, old, new):
            yield from [f"- output {label(name)} = {reference(left)}"] if left is not None else []
            yield from [f"+ output {label(name)} = {reference(right)}"] if right is not None else []


def _layers(old: Network, new: Network) -> Iterator[str]:
    kept = {
        layer.name for layer in new if layer.name in old._layers and _same(old._layers[layer.name], layer, old, new)
    }
    waiting = iter(old.layers)
    for layer in new:
        if layer.name not in kept:
            continue_at = [gone for gone in _until(waiting, None) if gone.name not in kept] if not kept else []
            yield from (f"- {layer_text(gone)}" for gone in continue_at)
            yield f"+ {layer_text(layer)}"
            continue
        yield from (f"- {layer_text(gone)}" for gone in _until(waiting, layer.name) if gone.name not in kept)
    yield from (f"- {layer_text(gone)}" for gone in waiting if gone.name not in kept)


def _until(layers: Iterator[Layer], name: str | None) -> Iterator[Layer]:
    for layer in layers:
        if layer.name == name:
            return
        yield layer


def _same(left: Layer, right: Layer, old: Network, new: Network) -> bool:
    """One operator, the same literals and types, and operands that correspond."""
    if left.op is not right.op or len(left.outputs) != len(right.outputs):
        return False
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(left.outputs, right.outputs, strict=True)):
        return False
    if not same_value(_literals(left.args), _literals(right.args)):
        return False
    pairs = zip(tensors_in(left.args), tensors_in(right.args), strict=True)
    return all(_corresponds(a, b, old, new) for a, b in pairs)


def _corresponds(left: Tensor, right: Tensor, old: Network, new: Network) -> bool:
    """The same value, or one that took the place of a value that went."""
    if left.name == right.name:
        return True
    return not _has(new, _owner(left)) or not _has(old, _owner(right))


def _owner(tensor: Tensor) -> str:
    return tensor.parent.name if tensor.parent is not None else tensor.name


def _has(network: Network, name: str) -> bool:
    return name in network._layers or name in network._inputs or name in network._constants


def _literals(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor
    return tuple(map(_literals, value)) if isinstance(value, tuple) else value
