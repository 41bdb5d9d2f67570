"""Shape rules of our own operators: their declared shape functions, run over sketches instead of tensors."""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.errors import NetworkError
from enginery.network.dim import Size
from enginery.network.shapes.sizes import Rule, Shape, Types
from enginery.network.tensor import Tensor


class Sketch:
    """As much of a torch.Tensor as the shape function of an op may ask for: shape, dtype and empty ones like it."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Size | Shape:
        return self.shape if dim is None else self.shape[dim]

    def new_empty(self, *sizes: Any, dtype: torch.dtype | None = None) -> Sketch:
        shape = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        return Sketch(shape, dtype or self.dtype)


def _sketch(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Sketch(value.shape, value.dtype)
    return [_sketch(item) for item in value] if isinstance(value, tuple) else value


def rule(op: ops.Op) -> Rule:
    """The shape rule of one of our ops, from its declaration."""
    required = [argument.name for argument in op.overload._schema.arguments if str(argument.type) == "Tensor"]

    def infer(*args: Any) -> Types:
        result = op.shape(*map(_sketch, args))
        if result is None:
            return ()
        return tuple((item.shape, item.dtype) for item in (result if isinstance(result, (tuple, list)) else (result,)))

    def checked(*args: Any) -> Types:
        tensors = sum(isinstance(value, Tensor) for value in args)
        if tensors < len(required):
            raise NetworkError(f"expected tensors for {', '.join(required)}")
        return infer(*args)

    return checked


RULES = {op.overload: rule(op) for op in ops.OPS}
