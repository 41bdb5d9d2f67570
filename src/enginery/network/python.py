"""The network as a runnable Python function, for people who debug a rewrite."""

from __future__ import annotations

import keyword
import re
from typing import TYPE_CHECKING, Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, symbols_of
from enginery.network.operator import REQUIRED, Operator, signature
from enginery.network.tensor import Tensor
from enginery.network.text import same_value, type_text

if TYPE_CHECKING:
    from enginery.network.network import Network


def to_python(network: Network) -> str:
    """Source of `network(inputs…, constants)`: `constants` maps names to tensors, the outputs come as a tuple."""
    return _Writer(network).write()


class _Writer:
    def __init__(self, network: Network) -> None:
        self.network = network
        self.taken = {"torch", "enginery", "constants", *network.ranges}
        self.names: dict[Tensor, str] = {}

    def write(self) -> str:
        network = self.network
        parameters = [self.variable(tensor, tensor.name) for tensor in network.inputs]
        lines = [
            "import torch",
            "",
            "import enginery.ops  # registers torch.ops.enginery",
            "",
            "",
            f"def network({', '.join([*parameters, 'constants'])}):",
            *(f"    {name} = {source}" for name, source in self.symbols().items()),
        ]
        for tensor in network.constants:
            if tensor._uses or tensor.is_output:
                name = self.variable(tensor, tensor.name)
                lines.append(f"    {name} = constants[{tensor.name!r}]  # {type_text(tensor)}")
        for layer in network:
            known = signature(layer.op)
            arguments = []
            for i, (default, value) in enumerate(zip(known.defaults, layer.args, strict=True)):
                if default is REQUIRED and i not in known.keyword_only:
                    arguments.append(self.value(value))
                elif not same_value(value, default):
                    arguments.append(f"{known.names[i]}={self.value(value)}")
            names = [self.variable(output, output.name) for output in layer.outputs]
            target = f"{', '.join(names)}{'' if known.is_single else ','} = " if names else ""
            comment = ", ".join(map(type_text, layer.outputs))
            lines.append(f"    {target}{_callee(layer.op)}({', '.join(arguments)})  # {comment}")
        results = ", ".join(self.names[tensor] for tensor in network.outputs)
        return "\n".join([*lines, f"    return ({results},)"]) + "\n"

    def symbols(self) -> dict[str, str]:
        """Each symbolic size and where it is read off."""
        found: dict[str, str] = {}
        for tensor in self.network.inputs:
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, Dim) and size.name is not None:
                    found.setdefault(size.name, f"{self.names[tensor]}.shape[{axis}]")
        return found

    def variable(self, tensor: Tensor, name: str) -> str:
        stem = re.sub(r"\W", "_", name)
        stem = f"v_{stem}" if not stem.isidentifier() or keyword.iskeyword(stem) else stem
        candidate, number = stem, 1
        while candidate in self.taken:
            candidate, number = f"{stem}__{number}", number + 1
        self.taken.add(candidate)
        self.names[tensor] = candidate
        return candidate

    def value(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self.names[value]
        if isinstance(value, tuple):
            return f"[{', '.join(map(self.value, value))}]"
        if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
            return f'float("{value}")'
        if isinstance(value, (torch.device, str)):
            return repr(str(value)) if isinstance(value, str) else f"torch.device({str(value)!r})"
        if isinstance(value, Dim) and any(not symbol.isidentifier() for symbol in symbols_of([value])):
            raise NetworkError(f"the size {value} has no Python form")
        return str(value)


def _callee(op: Operator) -> str:
    return f"torch.ops.{op.namespace}.{signature(op).short_name}.{op._overloadname}"
