"""What can be read of a network around one block, in terms that compare between blocks: objects go by numbers."""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Callable
from functools import cache
from typing import Any

from enginery.network.layer import Layer
from enginery.network.tensor import Tensor

MANY = 16
"""users of a value beyond which rules are not followed"""


def facts(layer: Layer) -> tuple:
    """Operator, literals, types of what it reads and makes: hashable, and equal for layers that compute alike."""
    types = [(tensor.shape, tensor.dtype, tensor.is_constant) for tensor in (*layer._inputs, *layer.outputs)]
    return id(layer.op), layer.has_effects, tuple([_plain(value) for value in layer._args]), tuple(types)


def same_facts(one: Layer, other: Layer) -> bool:
    """`facts(one) == facts(other)`, in a tenth of the time."""
    if one.op is not other.op or one.has_effects != other.has_effects or not _same(one._args, other._args):
        return False
    for a, b in zip((*one._inputs, *one.outputs), (*other._inputs, *other.outputs), strict=True):
        if a.shape != b.shape or a.dtype is not b.dtype or a.is_constant != b.is_constant:
            return False
    return True


def _same(one: tuple, other: tuple) -> bool:
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a is b:
            continue
        kind = a.__class__
        if kind is not b.__class__:
            return False
        if kind is tuple:
            if not _same(a, b):
                return False
        elif kind is not Tensor and _plain(a) != _plain(b):
            return False
    return True


def _plain(value: Any) -> Any:
    """Hashable, and equal only if nothing could tell the values apart: 1, 1.0 and True differ, 0.0 and -0.0 too."""
    kind = value.__class__
    if kind is Tensor or value is None:
        return kind
    if kind is tuple:
        return tuple([_plain(item) for item in value])
    return (float, value.hex()) if kind is float else (kind, value)


class View:
    """The objects of a block by number, and others, by negative ones, as they are met."""

    __slots__ = ("_others", "_own", "_theirs", "objects", "orders")

    def __init__(self, objects: list[Any], numbers: dict[Any, int]) -> None:
        self.objects, self._own = objects, numbers
        self._theirs: dict[Any, int] = {}
        self._others: list[Any] = []
        self.orders: list[int] = []
        """places in the execution order that were read"""

    def number(self, thing: Any) -> int:
        known = self._own.get(thing)
        if known is None:
            known = self._theirs.get(thing)
            if known is None:
                self._others.append(thing)
                known = self._theirs[thing] = -len(self._others)
        return known

    def thing(self, number: int) -> Any:
        return self.objects[number] if number >= 0 else self._others[-1 - number]

    def __contains__(self, thing: Any) -> bool:
        return thing in self._own or thing in self._theirs


Read = Callable[[View, Any], Any]
"""Reads something of a layer or tensor: a hashable result, with numbers in place of objects."""


def FACTS(view: View, layer: Layer) -> tuple:
    """What the layer is, and which tensors it reads and makes."""
    number = view.number
    return (facts(layer), *[number(t) for t in layer._inputs], *[number(t) for t in layer.outputs])


def PARENT(view: View, tensor: Tensor) -> int | None:
    return None if tensor.parent is None else view.number(tensor.parent)


def INDEX(view: View, tensor: Tensor) -> int:
    """Which output of its layer it is."""
    return tensor.index


def COUNT(view: View, tensor: Tensor) -> int:
    """How many layers read it."""
    return len(tensor._uses)


def USES(view: View, tensor: Tensor) -> Any:
    """Its users in execution order, each with the number of its reads; NotImplemented if there are MANY."""
    uses = tensor._uses
    if len(uses) > MANY:
        return NotImplemented
    return tuple([item for user in tensor.users for item in (view.number(user), uses[user])])


def ORDER(view: View, layer: Layer) -> int:
    """Its place among the layers whose place was read before."""
    place = bisect(view.orders, layer.order)
    insort(view.orders, layer.order)
    return place


@cache
def literal(slot: str) -> Read:
    """The value of a slot that is compared as it is, such as a name."""

    def read(view: View, thing: Any) -> Any:
        return getattr(thing, slot)

    return read
