"""What a network computes, apart from how its layers are named and in which order independent ones stand."""

from __future__ import annotations

from typing import Any

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.tensor import Tensor


def structure(network: Network) -> list[str]:
    """One line per output, input and constant, each value written as an expression of numbered layers: names
    left out.
    """
    numbers: dict[Layer, int] = {}
    lines: list[str] = []

    def value(item: Any) -> str:
        if isinstance(item, Tensor):
            if item.parent is None:
                return f"%{item.name}"
            place = f".{item.index}" if len(item.parent.outputs) > 1 else ""
            return f"#{numbers[item.parent]}{place}"
        if isinstance(item, tuple):
            return "(" + ", ".join(map(value, item)) + ")"
        return repr(item)

    def visit(root: Layer) -> None:
        pending = [root]
        while pending:
            layer = pending[-1]
            missing = [t.parent for t in layer.inputs if t.parent is not None and t.parent not in numbers]
            if missing:
                pending.append(missing[0])
                continue
            pending.pop()
            if layer not in numbers:
                numbers[layer] = len(numbers)
                types = ", ".join(f"{str(o.dtype).removeprefix('torch.')}{list(o.shape)}" for o in layer.outputs)
                lines.append(f"#{numbers[layer]} = {layer.op}{value(layer.args)} -> {types}")

    for name, tensor in zip(network.output_names, network.outputs, strict=True):
        if tensor.parent is not None:
            visit(tensor.parent)
        lines.append(f"output {name} = {value(tensor)}")
    for layer in network:
        if layer.has_effects:
            visit(layer)
    return lines
