"""Type promotion (https://docs.pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc).

Operands fall in three groups: tensors with dimensions, scalars (tensors without), and Python numbers. The first group
decides unless a later one is of a higher category (bool < integer < floating < complex).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim
from enginery.network.tensor import Tensor

_BOOL, _INTEGER, _FLOATING, _COMPLEX = range(4)


@cache
def category(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return _COMPLEX
    if dtype.is_floating_point:
        return _FLOATING
    return _BOOL if dtype == torch.bool else _INTEGER


def number_dtype(value: Any) -> torch.dtype:
    """The dtype that a Python number brings along; float32 for floats."""
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, (int, Dim)):
        return torch.int64
    if isinstance(value, float):
        return torch.float32
    if isinstance(value, complex):
        return torch.complex64
    raise NetworkError(f"expected a tensor or a number, not {value!r}")


def result_type(left: Any, right: Any) -> torch.dtype:
    """The dtype of an arithmetic result of two operands, tensors or numbers."""
    if type(left) is Tensor and type(right) is Tensor:
        if left.dtype is right.dtype:
            return left.dtype
        return _combine(left.dtype, bool(left.shape), right.dtype, bool(right.shape))
    if type(left) is Tensor:
        return _with_number(left.dtype, number_dtype(right))
    if type(right) is Tensor:
        return _with_number(right.dtype, number_dtype(left))
    return promote(number_dtype(left), number_dtype(right))


def result_type_of(values: tuple | list) -> torch.dtype:
    """As `result_type`, of any number of operands; None is skipped."""
    groups: list[torch.dtype | None] = [None, None, None]
    for value in values:
        if value is None:
            continue
        is_tensor = type(value) is Tensor
        group = (0 if value.shape else 1) if is_tensor else 2
        dtype = value.dtype if is_tensor else number_dtype(value)
        present = groups[group]
        groups[group] = dtype if present is None else promote(present, dtype)
    result: torch.dtype | None = None
    for dtype in reversed(groups):
        if dtype is not None:
            result = dtype if result is None else _overrule(dtype, result)
    if result is None:
        raise NetworkError("no operands")
    return result


@cache
def promote(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    try:
        return torch.promote_types(left, right)
    except RuntimeError as error:
        raise NetworkError(str(error).splitlines()[0]) from None


@cache
def as_floating(dtype: torch.dtype) -> torch.dtype:
    """What functions such as exp return: integers and bools become float32."""
    return dtype if category(dtype) >= _FLOATING else torch.float32


@cache
def as_accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums return: integers and bools become int64."""
    return dtype if category(dtype) >= _FLOATING else torch.int64


@cache
def _with_number(dtype: torch.dtype, number: torch.dtype) -> torch.dtype:
    return _overrule(dtype, number)


@cache
def _combine(left: torch.dtype, left_ranked: bool, right: torch.dtype, right_ranked: bool) -> torch.dtype:
    if left_ranked == right_ranked:
        return promote(left, right)
    return _overrule(left, right) if left_ranked else _overrule(right, left)


@cache
def _overrule(high: torch.dtype, low: torch.dtype) -> torch.dtype:
    """`high` is of the deciding group: `low` counts only if its category is higher."""
    if category(high) == _COMPLEX:
        return high
    if category(high) == _FLOATING:
        return promote(high, low) if category(low) == _COMPLEX else high
    if high == torch.bool or category(low) >= _FLOATING:
        return promote(high, low)
    return high
