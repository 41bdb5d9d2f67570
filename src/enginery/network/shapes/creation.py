"""Shape rules of conversions and of operators that make new tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Size
from enginery.network.shapes.promotion import number_dtype
from enginery.network.shapes.sizes import Types, ceil_div, table
from enginery.network.tensor import Tensor


def to_dtype(self: Tensor, dtype: torch.dtype | None, *rest: Any) -> Types:
    return ((self.shape, dtype or self.dtype),)


def to_device(self: Tensor, device: Any, dtype: torch.dtype, *rest: Any) -> Types:
    return ((self.shape, dtype),)


def to_other(self: Tensor, other: Tensor, *rest: Any) -> Types:
    return ((self.shape, other.dtype),)


def full(size: tuple, value: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return ((size, dtype or number_dtype(value)),)


def blank(size: tuple, dtype: torch.dtype | None = None, *rest: Any) -> Types:
    return ((size, dtype or torch.float32),)


def scalar_tensor(value: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return (((), dtype or torch.float32),)


def blank_like(self: Tensor, dtype: torch.dtype | None = None, *rest: Any) -> Types:
    return ((self.shape, dtype or self.dtype),)


def full_like(self: Tensor, value: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return ((self.shape, dtype or self.dtype),)


def new_blank(self: Tensor, size: tuple, dtype: torch.dtype | None = None, *rest: Any) -> Types:
    return ((size, dtype or self.dtype),)


def new_full(self: Tensor, size: tuple, value: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return ((size, dtype or self.dtype),)


def arange(end: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return _arange(0, end, 1, dtype)


def arange_start(start: Any, end: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return _arange(start, end, 1, dtype)


def arange_step(start: Any, end: Any, step: Any, dtype: torch.dtype | None, *rest: Any) -> Types:
    return _arange(start, end, step, dtype)


def _arange(start: Any, end: Any, step: Any, dtype: torch.dtype | None) -> Types:
    if dtype is None:
        dtype = torch.float32 if any(isinstance(value, float) for value in (start, end, step)) else torch.int64
    if not isinstance(step, (int, float)) or step == 0:
        raise NetworkError(f"arange by steps of {step}")
    span = end - start
    count: Size
    if isinstance(span, (int, float)):
        count = math.ceil(span / step)
        if count < 0:
            raise NetworkError(f"arange from {start} to {end} by {step}")
    elif isinstance(step, int) and step > 0:
        count = ceil_div(span, step)
    else:
        raise NetworkError(f"arange from {start} to {end} by {step} has no known length")
    return (((count,), dtype),)


def linspace(start: Any, end: Any, steps: Size, dtype: torch.dtype | None, *rest: Any) -> Types:
    return (((steps,), dtype or torch.float32),)


RULES = table(
    {
        "to.dtype _to_copy to.dtype_layout _cast_Float": to_dtype,
        "to.device": to_device,
        "to.other type_as": to_other,
        "full": full,
        "zeros ones empty.memory_format": blank,
        "rand randn": blank,
        "scalar_tensor": scalar_tensor,
        "zeros_like ones_like empty_like rand_like randn_like": blank_like,
        "full_like": full_like,
        "new_zeros new_ones new_empty": new_blank,
        "new_full": new_full,
        "arange": arange,
        "arange.start": arange_start,
        "arange.start_step": arange_step,
        "linspace": linspace,
    }
)
