"""The text form of a network: one line for each range, input, constant, layer and output.

    network 1
    range tokens = 2..4096
    input %ids: int64[tokens]
    constant %embed.weight: float32[32000, 64]
    %embed.embedding: float32[tokens, 64] = aten.embedding(%embed.weight, %ids)
    %norm: float32[tokens, 64] = aten.rms_norm(%embed.embedding, [64], eps=1e-06) @model.norm <- FuseNorm(mul, rsqrt)
    %top: (float32[tokens, 2], int64[tokens, 2]) = aten.topk(%norm, 2)
    output best = %top#1

Required arguments stand in schema order; of the others those that differ from their defaults, by name. `@` gives the
module that made the call where the layer's name does not begin with it, `<-` the rule that made the layer and what it
replaced. Names and labels of other characters are quoted as in JSON. Blank lines and lines that begin with `#` are
skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, symbols_of
from enginery.network.layer import Layer
from enginery.network.operator import REQUIRED, operator_name, signature
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    from enginery.network.network import Network

VERSION = 1
HEADER = f"network {VERSION}"
PLAIN_NAME = re.compile(r"[A-Za-z_][\w.\-]*(#\d{1,6})?\Z")
_PLAIN_LABEL = re.compile(r"[\w.\-]+\Z")
_NUMBERED = re.compile(r"_\d+\Z")

DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
}
RESERVED = frozenset(
    {*DTYPES, "True", "False", "None", "inf", "nan", "min", "max", "layout", "memory_format", "device"}
)


def write(network: Network) -> str:
    """The text form. Equal networks give equal texts."""
    return "\n".join([HEADER, *_lines(network)]) + "\n"


def _lines(network: Network) -> Iterator[str]:
    for symbol, (low, high) in network.ranges.items():
        yield f"range {symbol} = {low}..{'' if high is None else high}"
    for kind, tensors in (("input", network.inputs), ("constant", network.constants)):
        for tensor in tensors:
            yield f"{kind} {reference(tensor)}: {type_text(tensor)}"
    for layer in network:
        yield layer_text(layer)
    for name, tensor in zip(network.output_names, network.outputs, strict=True):
        yield f"output {label(name)} = {reference(tensor)}"


def layer_text(layer: Layer) -> str:
    types = ", ".join(map(type_text, layer.outputs))
    if len(layer.outputs) != 1:
        types = f"({types})"
    text = f"{_quoted_name(layer.name)}: {types} = {operator_name(layer.op)}({arguments_text(layer)})"
    if layer.module_path != implied_path(layer.name, signature(layer.op).short_name):
        text += f" @{label(layer.module_path) if layer.module_path else ''}"
    if layer.provenance is not None:
        text += f" <- {label(layer.provenance.rule)}({', '.join(map(label, layer.provenance.replaced))})"
    return text


def arguments_text(layer: Layer) -> str:
    known = signature(layer.op)
    parts = []
    for name, default, value in zip(known.names, known.defaults, layer.args, strict=True):
        if default is REQUIRED:
            parts.append(value_text(value))
        elif not same_value(value, default):
            parts.append(f"{name}={value_text(value)}")
    return ", ".join(parts)


def same_value(left: Any, right: Any) -> bool:
    """Equal and of one type, at every depth: 1, 1.0 and True differ; nan equals itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same_value, left, right))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


def value_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return reference(value)
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Dim):
        return size_text(value)
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        name = str(value).removeprefix("torch.")
        return name if isinstance(value, torch.dtype) else f"{type(value).__name__}.{name}"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.device):
        return f"device.{json.dumps(str(value))}"
    raise NetworkError(f"an argument of type {type(value).__name__} has no text form")


def size_text(size: Any) -> str:
    if isinstance(size, Dim):
        unfit = symbols_of([size]) & RESERVED
        if unfit:
            raise NetworkError(f"a symbolic size cannot be named {min(unfit)}")
    return str(size)


def type_text(tensor: Tensor) -> str:
    sizes = ", ".join(map(size_text, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{sizes}]"


def reference(tensor: Tensor) -> str:
    return _quoted_name(tensor.name)


def _quoted_name(name: str) -> str:
    return f"%{name}" if PLAIN_NAME.match(name) else f"%{json.dumps(name)}"


def label(name: str) -> str:
    return name if _PLAIN_LABEL.match(name) else json.dumps(name)


def implied_path(name: str, short_name: str) -> str:
    """The module path that a layer's name says: `a.b` of `a.b.linear` and `a.b.linear_2` of the operator `linear`."""
    path, _, last = name.rpartition(".")
    return path if last == short_name or _NUMBERED.sub("", last) == short_name else ""
