"""Shape rules of reductions, scans, sorts, softmax and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.shapes.promotion import as_accumulated, as_floating, category
from enginery.network.shapes.sizes import Shape, Types, axes, axis, differ, replaced, show, table
from enginery.network.tensor import Tensor

Axes = Sequence[int] | int | None


def reduced(shape: Shape, dims: Axes, keepdim: bool) -> Shape:
    chosen = axes(dims, len(shape))
    if keepdim:
        return tuple(1 if i in chosen else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in chosen)


def sum_all(self: Tensor, dtype: torch.dtype | None = None) -> Types:
    return (((), dtype or as_accumulated(self.dtype)),)


def sum_dim(self: Tensor, dims: Axes, keepdim: bool, dtype: torch.dtype | None = None) -> Types:
    return ((reduced(self.shape, dims, keepdim), dtype or as_accumulated(self.dtype)),)


def mean_all(self: Tensor, dtype: torch.dtype | None) -> Types:
    return (((), _floating_only(dtype or self.dtype)),)


def mean_dim(self: Tensor, dims: Axes, keepdim: bool, dtype: torch.dtype | None) -> Types:
    return ((reduced(self.shape, dims, keepdim), _floating_only(dtype or self.dtype)),)


def _floating_only(dtype: torch.dtype) -> torch.dtype:
    if category(dtype) < 2:
        raise NetworkError(f"a mean of {str(dtype).removeprefix('torch.')} values has no dtype")
    return dtype


def extreme(self: Tensor, dims: Axes, keepdim: bool) -> Types:
    return ((reduced(self.shape, dims, keepdim), self.dtype),)


def extreme_all(self: Tensor) -> Types:
    return (((), self.dtype),)


def extreme_dim(self: Tensor, dim: int, keepdim: bool) -> Types:
    shape = reduced(self.shape, dim, keepdim)
    return ((shape, self.dtype), (shape, torch.int64))


def argument(self: Tensor, dim: int | None, keepdim: bool) -> Types:
    return ((reduced(self.shape, dim, keepdim), torch.int64),)


def _truth(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.uint8 else torch.bool


def truth_all(self: Tensor) -> Types:
    return (((), _truth(self.dtype)),)


def truth_dim(self: Tensor, dims: Axes, keepdim: bool) -> Types:
    return ((reduced(self.shape, dims, keepdim), _truth(self.dtype)),)


def spread(self: Tensor, dims: Axes, unbiased: Any, keepdim: bool) -> Types:
    return ((reduced(self.shape, dims, keepdim), self.dtype),)


def spread_all(self: Tensor, unbiased: bool) -> Types:
    return (((), self.dtype),)


def log_sum_exp(self: Tensor, dims: Axes, keepdim: bool) -> Types:
    return ((reduced(self.shape, dims, keepdim), as_floating(self.dtype)),)


def vector_norm(self: Tensor, order: Any, dims: Axes, keepdim: bool, dtype: torch.dtype | None) -> Types:
    return ((reduced(self.shape, dims, keepdim), dtype or self.dtype),)


def scan(self: Tensor, dim: int, dtype: torch.dtype | None) -> Types:
    axis(dim, len(self.shape))
    return ((self.shape, dtype or as_accumulated(self.dtype)),)


def softmax(self: Tensor, dim: int, dtype: torch.dtype | None) -> Types:
    axis(dim, len(self.shape))
    return ((self.shape, dtype or self.dtype),)


def core_softmax(self: Tensor, dim: int, half_to_float: bool) -> Types:
    axis(dim, len(self.shape))
    return ((self.shape, torch.float32 if half_to_float else self.dtype),)


def sort(self: Tensor, *rest: Any) -> Types:
    return ((self.shape, self.dtype), (self.shape, torch.int64))


def argsort(self: Tensor, *rest: Any) -> Types:
    return ((self.shape, torch.int64),)


def topk(self: Tensor, k: int, dim: int, *rest: Any) -> Types:
    place = axis(dim, len(self.shape))
    size = self.shape[place] if self.shape else 1
    if isinstance(size, int) and isinstance(k, int) and k > size:
        raise NetworkError(f"the largest {k} of {size}")
    shape = replaced(self.shape, place, k) if self.shape else ()
    return ((shape, self.dtype), (shape, torch.int64))


def norm(input: Tensor, normalized_shape: tuple, *rest: Any) -> Types:
    count = len(normalized_shape)
    if any(map(differ, input.shape[-count:], normalized_shape)):
        raise NetworkError(f"{show(input.shape)} does not end in {show(normalized_shape)}")
    return ((input.shape, input.dtype),)


def native_layer_norm(input: Tensor, normalized_shape: tuple, *rest: Any) -> Types:
    norm(input, normalized_shape)
    outer = len(input.shape) - len(normalized_shape)
    statistics = input.shape[:outer] + (1,) * len(normalized_shape)
    return ((input.shape, input.dtype), (statistics, input.dtype), (statistics, input.dtype))


RULES = table(
    {
        "sum prod": sum_all,
        "sum.dim_IntList prod.dim_int nansum": sum_dim,
        "mean": mean_all,
        "mean.dim": mean_dim,
        "amax amin": extreme,
        "max min": extreme_all,
        "max.dim min.dim": extreme_dim,
        "argmax argmin": argument,
        "any all": truth_all,
        "any.dim all.dim any.dims all.dims": truth_dim,
        "var.dim std.dim var.correction std.correction": spread,
        "var std": spread_all,
        "logsumexp": log_sum_exp,
        "linalg_vector_norm": vector_norm,
        "cumsum cumprod": scan,
        "softmax.int log_softmax.int special_softmax special_log_softmax.int": softmax,
        "_softmax _log_softmax": core_softmax,
        "sort sort.stable": sort,
        "argsort argsort.stable": argsort,
        "topk": topk,
        "layer_norm rms_norm": norm,
        "native_layer_norm": native_layer_norm,
    }
)
