"""What a network knows of an operator: its schema, in the form that makes every call of it look alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from enginery.errors import NetworkError

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
    random: bool
    returns: tuple[str, ...]

    @property
    def has_effects(self) -> bool:
        """The call writes to an argument or draws random numbers: it may not be moved, merged or removed."""
        return bool(self.written) or self.random

    def normalise(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All arguments in schema order, defaults filled in, lists as tuples."""
        if len(args) > len(self.names):
            raise NetworkError(f"{len(args)} arguments given where the schema has {len(self.names)}")
        values = [*args, *self.defaults[len(args) :]]
        for name, value in kwargs.items():
            if name not in self.names:
                raise NetworkError(f"no argument named {name!r}; the schema has {', '.join(self.names)}")
            values[self.names.index(name)] = value
        for name, value in zip(self.names, values, strict=True):
            if value is REQUIRED:
                raise NetworkError(f"argument {name!r} is missing")
        return tuple(freeze(value) for value in values)


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
    return Signature(
        names=tuple(argument.name for argument in arguments),
        defaults=tuple(
            freeze(argument.default_value) if argument.has_default_value() else REQUIRED for argument in arguments
        ),
        types=tuple(str(argument.type) for argument in arguments),
        keyword_only=frozenset(i for i, argument in enumerate(arguments) if argument.kwarg_only),
        written=frozenset(i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write),
        random=torch.Tag.nondeterministic_seeded in op.tags,
        returns=tuple(str(item.type) for item in schema.returns),
    )


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
        if isinstance(found, Operator):
            return found
    raise NetworkError(f"unknown operator {name!r}", f"Operators come from: {', '.join(_NAMESPACES)}")
