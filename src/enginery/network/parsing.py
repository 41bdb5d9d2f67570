"""Reads the text form of a network (`text.py`): names are defined once and before their use, types inferred again."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import torch

from enginery.errors import NetworkError
from enginery.network.collection import paused_collection
from enginery.network.dim import Size
from enginery.network.expressions import Expressions
from enginery.network.layer import Provenance
from enginery.network.operator import REQUIRED, Operator, find_operator, signature
from enginery.network.tensor import Tensor
from enginery.network.text import HEADER, PLAIN_NAME, implied_path
from enginery.network.types import infer_types
from enginery.network.verify import check_arguments, check_types

if TYPE_CHECKING:
    from enginery.network.network import Network

MAX_LINES = 1_000_000
MAX_LINE = 1 << 20

_NAME = r"%(?:[A-Za-z_][\w.\-]*(?:#\d{1,6})?|\"(?:[^\"\\]|\\.)*\")"
_LABEL = r"(?:[\w.\-]+|\"(?:[^\"\\]|\\.)*\")"
_LAYER = re.compile(
    rf"(?P<name>{_NAME}): (?P<types>\(?[a-z][^=]*?) = (?P<op>[\w.]+)\((?P<args>.*?)\)"
    rf"(?P<path> @(?:{_LABEL})?)?(?: <- (?P<rule>{_LABEL})\((?P<replaced>[^()]*)\))?\Z"
)
_DECLARATION = re.compile(rf"(input|constant) ({_NAME}): (.+)\Z")
_OUTPUT = re.compile(rf"output ({_LABEL}) = ({_NAME})\Z")
_RANGE = re.compile(r"range ([A-Za-z_]\w*) = (\d{1,18})\.\.(\d{0,18})\Z")
_LABELS = re.compile(_LABEL)

Types = tuple[tuple[tuple[Size, ...], torch.dtype], ...]


def parse(network: Network, text: str, *, max_lines: int = MAX_LINES) -> None:
    """Adds what a text says to an empty network.

    Raises NetworkError that names the line and the layer for text that is cut or malformed, an unknown operator, a
    name that is used before its definition or defined twice, an argument or a type that does not fit, and more than
    `max_lines` lines.
    """
    count = text.count("\n") + 1
    if count > max_lines:
        raise NetworkError(f"the text has {count} lines, more than {max_lines}")
    with paused_collection():
        _Parser(network).parse(text)


class _Parser:
    def __init__(self, network: Network) -> None:
        self.network = network
        self.tensors: dict[str, Tensor] = {}
        self.types: dict[str, Types] = {}
        self.expressions = Expressions(self.tensors)
        self.operators: dict[str, Operator] = {}

    def parse(self, text: str) -> None:
        lines = text.split("\n")
        if lines[0] != HEADER:
            raise NetworkError(f"line 1: the text does not begin with {HEADER!r}")
        if lines[-1]:
            raise NetworkError(f"line {len(lines)}: the text is cut: no line end")
        for number, line in enumerate(lines[1:], 2):
            if not line or line.startswith("#"):
                continue
            try:
                self._line(line)
            except NetworkError as error:
                head = line.split(":", 1)[0] if line.startswith("%") else ""
                where = f" (layer {head[1:80]})" if head else ""
                raise NetworkError(f"line {number}{where}: {error.cause}", error.fix) from None
        if not self.network.outputs:
            raise NetworkError(f"line {len(lines)}: the text is cut: no output")

    def _line(self, line: str) -> None:
        if len(line) > MAX_LINE:
            raise NetworkError(f"the line has {len(line)} characters, more than {MAX_LINE}")
        if line.startswith("%"):
            self._layer(line)
        elif line.startswith("output "):
            self._output(line)
        elif line.startswith("range "):
            self._range(line)
        else:
            self._declaration(line)

    def _layer(self, line: str) -> None:
        if self.network._outputs:
            raise NetworkError("a layer after the outputs")
        found = _LAYER.match(line)
        if found is None:
            raise NetworkError(f"cannot be read: {line[:80]!r}")
        name_text, types_text, op_text, args_text, path, rule, replaced = found.groups()
        name = self._new_name(name_text)
        op = self._operator(op_text)
        args = self._arguments(op, args_text)
        check_arguments(op, args)
        types = self.types.get(types_text) or self._types(types_text)
        inferred = infer_types(op, args)
        if inferred != types:
            check_types(types, inferred, self.network.ranges)
        layer = self.network.add_layer(op, args, name=name, types=types)
        layer.module_path = implied_path(name, signature(op).short_name) if path is None else _unquote(path[2:])
        if rule is not None:
            layer.provenance = Provenance(_unquote(rule), tuple(map(_unquote, _LABELS.findall(replaced))))
        for output in layer.outputs:
            self._define(output)

    def _arguments(self, op: Operator, text: str) -> tuple:
        positional, named = self.expressions.call(text)
        known = signature(op)
        values = list(known.defaults)
        required = [place for place, default in enumerate(values) if default is REQUIRED]
        if len(positional) != len(required):
            raise NetworkError(
                f"{len(positional)} arguments stand without a name, the operator requires {len(required)}"
            )
        for place, value in zip(required, positional, strict=True):
            values[place] = value
        for name, value in named.items():
            if name not in known.index or known.defaults[known.index[name]] is REQUIRED:
                raise NetworkError(f"the operator has no optional argument {name!r}")
            values[known.index[name]] = value
        return tuple(values)

    def _operator(self, text: str) -> Operator:
        if text not in self.operators:
            self.operators[text] = find_operator(text)
        return self.operators[text]

    def _types(self, text: str) -> Types:
        several = text.startswith("(")
        if several and not text.endswith(")"):
            raise NetworkError(f"{text[:80]!r} is no list of types")
        types = self.expressions.types(text[1:-1] if several else text)
        if several == (len(types) == 1):
            raise NetworkError(f"{text[:80]!r} is no type")
        self.types[text] = types
        return types

    def _declaration(self, line: str) -> None:
        found = _DECLARATION.match(line)
        if found is None:
            raise NetworkError(f"cannot be read: {line[:80]!r}")
        kind, name_text, type_text = found.groups()
        if len(self.network):
            raise NetworkError(f"an {kind} after the layers" if kind == "input" else "a constant after the layers")
        types = self._types(type_text)
        if len(types) != 1:
            raise NetworkError(f"{type_text!r} is no type")
        ((shape, dtype),) = types
        name = self._new_name(name_text)
        add = self.network.add_input if kind == "input" else self.network.add_constant
        self._define(add(name, shape, dtype))

    def _output(self, line: str) -> None:
        found = _OUTPUT.match(line)
        if found is None:
            raise NetworkError(f"cannot be read: {line[:80]!r}")
        name = _unquote(found[1])
        if name in self.network._outputs:
            raise NetworkError(f"the output {name} is defined twice")
        self.network.set_output(name, self.expressions.tensor(found[2]))

    def _range(self, line: str) -> None:
        found = _RANGE.match(line)
        if found is None:
            raise NetworkError(f"cannot be read: {line[:80]!r}")
        low, high = int(found[2]), int(found[3]) if found[3] else None
        if found[1] in self.network.ranges or (high is not None and high < low):
            raise NetworkError(f"the range of {found[1]} is empty or given twice")
        self.network.ranges[found[1]] = low, high

    def _new_name(self, text: str) -> str:
        name = _unquote(text[1:])
        if name in self.network._names:
            raise NetworkError(f"the name {name} is defined twice")
        if "#" in name and PLAIN_NAME.match(name):
            raise NetworkError(f"{name} is the name of an output, not of a layer")
        return name

    def _define(self, tensor: Tensor) -> None:
        self.tensors[tensor.name] = tensor


def _unquote(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise NetworkError(f"{text[:80]} is no string") from None
