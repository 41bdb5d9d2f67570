"""Operators and methods of a tensor, for every class that stands for one: a network's Tensor, a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim

aten = torch.ops.aten


class TensorMethods:
    """Turns `x + y`, `x.view(…)` and `x[…]` into calls of the class's `__torch_function__`.

    A class with `rank` known can be indexed. `==` is identity, as hashing needs; use `torch.eq`.
    """

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise NotImplementedError

    def _call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return type(self).__torch_function__(function, (type(self),), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        method = None if name.startswith("_") else getattr(torch.Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return partial(self._call, method, self)

    def __add__(self, other: Any) -> Any:
        return self._call(aten.add.Tensor, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._call(aten.add.Tensor, self, other)

    def __sub__(self, other: Any) -> Any:
        return self._call(aten.sub.Tensor, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._call(aten.rsub.Scalar, self, other)

    def __mul__(self, other: Any) -> Any:
        return self._call(aten.mul.Tensor, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._call(aten.mul.Tensor, self, other)

    def __truediv__(self, other: Any) -> Any:
        return self._call(aten.div.Tensor, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._call(aten.mul.Tensor, self._call(aten.reciprocal.default, self), other)

    def __floordiv__(self, other: Any) -> Any:
        return self._call(aten.floor_divide.default, self, other)

    def __mod__(self, other: Any) -> Any:
        return self._call(torch.remainder, self, other)

    def __pow__(self, other: Any) -> Any:
        return self._call(torch.pow, self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._call(aten.pow.Scalar, other, self)

    def __matmul__(self, other: Any) -> Any:
        return self._call(aten.matmul.default, self, other)

    def __and__(self, other: Any) -> Any:
        return self._call(torch.bitwise_and, self, other)

    def __or__(self, other: Any) -> Any:
        return self._call(torch.bitwise_or, self, other)

    def __xor__(self, other: Any) -> Any:
        return self._call(torch.bitwise_xor, self, other)

    def __invert__(self) -> Any:
        return self._call(aten.bitwise_not.default, self)

    def __neg__(self) -> Any:
        return self._call(aten.neg.default, self)

    def __abs__(self) -> Any:
        return self._call(aten.abs.default, self)

    def __lt__(self, other: Any) -> Any:
        return self._call(torch.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return self._call(torch.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return self._call(torch.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return self._call(torch.ge, self, other)

    @property
    def T(self) -> Any:
        return self._call(aten.numpy_T.default, self)

    @property
    def mT(self) -> Any:
        return self._call(aten.mT.default, self)

    def __iter__(self) -> Iterator:
        return iter(self._call(aten.unbind.int, self))

    def __getitem__(self, index: Any) -> Any:
        """Integers, slices, `None`, `...` and index tensors, one operator each, as torch.export writes them."""
        entries = list(index) if isinstance(index, tuple) else [index]
        taken = sum(entry is not None and entry is not ... for entry in entries)
        hole = next((i for i, entry in enumerate(entries) if entry is ...), None)
        if hole is not None:
            entries[hole : hole + 1] = [slice(None)] * (self._rank_for_index() - taken)
        result, dim = self, 0
        tensors: dict[int, Any] = {}
        for entry in entries:
            if entry is None:
                result = result._call(aten.unsqueeze.default, result, dim)
            elif isinstance(entry, slice):
                result = _sliced(result, dim, entry)
            elif isinstance(entry, (int, Dim)) and not isinstance(entry, bool):
                result = result._call(aten.select.int, result, dim, entry)
                continue
            elif hasattr(type(entry), "__torch_function__"):
                tensors[dim] = entry
            else:
                raise NetworkError(f"a tensor cannot be indexed by {entry!r}")
            dim += 1
        if tensors:
            indices = tuple(tensors.get(i) for i in range(max(tensors) + 1))
            result = result._call(aten.index.Tensor, result, indices)
        return result

    def _rank_for_index(self) -> int:
        rank = getattr(self, "rank", None)
        if not isinstance(rank, int):
            raise NetworkError(
                "`...` in an index needs a tensor of known rank",
                "Write the dimensions out, or use torch.ops.aten.slice",
            )
        return rank


def _sliced(value: Any, dim: int, part: slice) -> Any:
    if part == slice(None):
        return value
    start = None if isinstance(part.start, int) and part.start == 0 else part.start
    return value._call(aten.slice.Tensor, value, dim, start, part.stop, 1 if part.step is None else part.step)
