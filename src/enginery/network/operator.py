"""What a network knows of an operator: its schema, in the form that makes every call of it look alike."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim

Operator = torch._ops.OpOverload


@dataclass(frozen=True)
class Signature:
    """The arguments of an operator in schema order. A call in normal form gives a value to each of them."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    """REQUIRED where there is none"""
    types: tuple[str, ...]
    keyword_only: frozenset[int]
    written: frozenset[int]
    """positions of arguments that the call writes to"""
    aliased: int | None
    """position of the argument whose memory the outputs may share"""
    random: bool
    returns: tuple[str, ...]
    bundle: Callable[..., tuple] | None
    """makes a named tuple of several outputs, such as `values` and `indices`; None where the schema gives no names"""
    short_name: str
    """`linear` of `aten::linear`"""
    lists: tuple[int, ...]
    """positions of arguments that are lists"""
    required: tuple[int, ...]
    """positions of arguments without a default"""
    floats: tuple[int, ...]
    """positions of arguments that are floats"""
    has_effects: bool
    """Some call of it writes to an argument or draws random numbers."""
    index: Mapping[str, int]
    """position of each argument by its name"""

    @property
    def is_single(self) -> bool:
        """The call has exactly one output, whatever its arguments."""
        return self.returns == ("Tensor",)

    def normalise(self, args: Sequence[Any], kwargs: Mapping[str, Any], missing: Any = None) -> tuple:
        """All arguments in schema order, defaults filled in, lists as tuples, numbers as floats where a float is meant.

        A required argument that is not given becomes `missing`; without it, it is an error.
        """
        count = len(args)
        if count > len(self.names):
            raise NetworkError(f"{self.short_name}: {count} arguments given where the schema has {len(self.names)}")
        values = [*args, *self.defaults[count:]]
        for name, value in kwargs.items():
            place = self.index.get(name)
            if place is None:
                raise NetworkError(
                    f"{self.short_name}: no argument is named {name!r}", f"Its arguments are: {', '.join(self.names)}"
                )
            if place < count:
                raise NetworkError(f"{self.short_name}: argument {name!r} is given twice")
            values[place] = value
        for place in self.lists:
            value = values[place]
            if value.__class__ is not tuple:
                values[place] = (value,) if isinstance(value, (int, Dim)) else freeze(value)
        for place in self.floats:
            if values[place].__class__ is int:
                values[place] = float(values[place])
        for place in self.required:
            if values[place] is REQUIRED:
                if missing is None:
                    raise NetworkError(f"{self.short_name}: argument {self.names[place]!r} is missing")
                values[place] = missing
        return tuple(values)


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


def freeze(value: Any) -> Any:
    """Lists to tuples, at every depth."""
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value


@cache
def signature(op: Operator) -> Signature:
    schema = op._schema
    arguments = schema.arguments
    types = tuple(str(argument.real_type) for argument in arguments)
    written = frozenset(
        i for i, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    )
    random = torch.Tag.nondeterministic_seeded in op.tags
    names = tuple(argument.name for argument in arguments)
    return Signature(
        names=names,
        defaults=tuple(
            _default(argument, text) if argument.has_default_value() else REQUIRED
            for argument, text in zip(arguments, types, strict=True)
        ),
        types=types,
        keyword_only=frozenset(i for i, argument in enumerate(arguments) if argument.kwarg_only),
        written=written,
        aliased=next((i for i, argument in enumerate(arguments) if _is_viewed(argument, types[i])), None),
        random=random,
        returns=tuple(str(item.type) for item in schema.returns),
        bundle=_bundle(schema),
        short_name=schema.name.partition("::")[2],
        lists=tuple(i for i, text in enumerate(types) if "List[" in text),
        required=tuple(i for i, argument in enumerate(arguments) if not argument.has_default_value()),
        floats=tuple(i for i, text in enumerate(types) if text in ("float", "Optional[float]")),
        has_effects=bool(written) or random,
        index=MappingProxyType({name: i for i, name in enumerate(names)}),
    )


def _is_viewed(argument: Any, text: str) -> bool:
    return text == "Tensor" and argument.alias_info is not None and not argument.alias_info.is_write


def _default(argument: Any, text: str) -> Any:
    """A default as a caller would write it; torch's schemas hold memory formats and dtypes as numbers."""
    value = argument.default_value
    if text == "MemoryFormat" and isinstance(value, int):
        return (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)[value]
    if text == "Optional[ScalarType]" and value == 4:
        return torch.int64
    return freeze(value)


def _bundle(schema: Any) -> Callable[..., tuple] | None:
    names = [item.name for item in schema.returns]
    return namedtuple(schema.name.partition("::")[2].lstrip("_"), names) if len(names) > 1 and all(names) else None


def draws(op: Operator, args: tuple) -> bool:
    """A call of an operator that may draw random numbers does: dropout does not at inference or with probability 0."""
    known = signature(op)
    if "dropout_p" in known.index:
        return args[known.index["dropout_p"]] != 0.0
    if "train" in known.index and "p" in known.index:
        return bool(args[known.index["train"]]) and args[known.index["p"]] != 0.0
    return known.random


def operator_name(op: Operator) -> str:
    """`aten.linear`, `aten.add.Tensor`, `enginery.attention`: the overload is named unless it is the default one."""
    name = op._schema.name.replace("::", ".")
    return f"{name}.{op._overloadname}" if op._overloadname != "default" else name


_NAMESPACES = ("aten", "enginery")


@cache
def find_operator(name: str) -> Operator:
    """The operator of a name as `operator_name` gives it, from the closed registry: `aten` and `enginery`."""
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.partition(".")
    if namespace in _NAMESPACES and packet_name:
        packet = getattr(getattr(torch.ops, namespace), packet_name, None)
        found = getattr(packet, overload or "default", None)
        if isinstance(found, Operator) and (namespace != "aten" or _is_function(found)):
            return found
    raise NetworkError(f"unknown operator {name!r}", f"Operators come from: {', '.join(_NAMESPACES)}")


def _is_function(op: Operator) -> bool:
    """It computes tensors from tensors and literals, writes to nothing and reads no file."""
    known = signature(op)
    plain = all(re.sub(r"Optional|List|[\[\]]", "", text) in _VALUES for text in known.types)
    return (
        plain
        and not known.written
        and known.short_name not in _OUTSIDE
        and set(known.returns) <= {"Tensor", "List[Tensor]"}
    )


_VALUES = frozenset(
    {"Tensor", "number", "int", "float", "bool", "str", "ScalarType", "Layout", "Device", "MemoryFormat", "Generator"}
)
_OUTSIDE = frozenset({"from_file", "_print", "_pin_memory", "pin_memory", "record_stream", "_assert_async"})
