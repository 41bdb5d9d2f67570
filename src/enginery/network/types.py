"""The types (shape and dtype) of a call's outputs from its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from enginery.errors import NetworkError
from enginery.network import faketensor
from enginery.network.operator import Operator, operator_name
from enginery.network.shapes import RULES, Types
from enginery.network.tensor import Tensor


def infer_types(op: Operator, args: tuple) -> Types:
    """One `(shape, dtype)` per output of a call whose arguments are in normal form.

    By the operator's shape rule, or else by FakeTensor, whose answers are remembered. Raises NetworkError if the
    arguments do not fit the operator or if a size depends on data.
    """
    rule = RULES.get(op)
    try:
        return rule(*args) if rule is not None else _remembered(op, tuple(map(_key, args)))
    except NetworkError as error:
        raise NetworkError(f"{operator_name(op)}: {error.cause}", error.fix) from None
    except (TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise NetworkError(f"{operator_name(op)} does not take {_describe(args)} ({error})") from None


@lru_cache(maxsize=4096)
def _remembered(op: Operator, key: tuple) -> Types:
    return faketensor.infer(op, key)


def _key(value: Any) -> Any:
    """An argument with its tensors replaced by their types, hashable; equal numbers of two types stay apart."""
    kind = value.__class__
    if kind is Tensor:
        return _make(faketensor.Type, (value.shape, value.dtype))
    if kind is tuple:
        return tuple(map(_key, value))
    return _make(faketensor.Literal, (kind, value)) if kind is int or kind is float or kind is bool else value


_make = tuple.__new__
"""what a named tuple does to make itself, in a third of the time"""


def _describe(args: tuple) -> str:
    text = ", ".join(map(repr, args))
    return text if len(text) < 200 else f"{text[:200]}…"


__all__ = ["Types", "infer_types"]
