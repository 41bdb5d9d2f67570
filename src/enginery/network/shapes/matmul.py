"""Shape rules of matrix products and of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from enginery.errors import NetworkError
from enginery.network.dim import Size
from enginery.network.shapes.promotion import promote
from enginery.network.shapes.sizes import (
    Types,
    broadcast,
    replaced,
    require_equal,
    require_same_dtype,
    show,
    table,
)
from enginery.network.tensor import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Types:
    shape, matrix = input.shape, weight.shape
    if len(matrix) not in (1, 2) or not shape:
        raise NetworkError(f"{show(shape)} · {show(matrix)}ᵀ: expected an input `[..., K]` and a weight `[N, K]`")
    if shape[-1] != matrix[-1]:
        require_equal(shape[-1], matrix[-1], f"{show(shape)} · {show(matrix)}ᵀ")
    if input.dtype is not weight.dtype or (bias is not None and bias.dtype is not input.dtype):
        require_same_dtype("operands", input, weight, bias)
    result = (*shape[:-1], *matrix[:-1])
    if bias is not None and bias.shape != matrix[:1] and broadcast(bias.shape, result) != result:
        raise NetworkError(f"the bias {show(bias.shape)} does not fit the output {show(result)}")
    return ((result, input.dtype),)


def mm(self: Tensor, other: Tensor) -> Types:
    return _product(self, other, 2)


def bmm(self: Tensor, other: Tensor) -> Types:
    return _product(self, other, 3)


def _product(self: Tensor, other: Tensor, rank: int) -> Types:
    if len(self.shape) != rank or len(other.shape) != rank:
        raise NetworkError(f"{show(self.shape)} · {show(other.shape)}: expected two tensors of rank {rank}")
    for i in range(rank - 2):
        require_equal(self.shape[i], other.shape[i], "batch")
    return matmul(self, other)


def matmul(self: Tensor, other: Tensor) -> Types:
    left, right = self.shape, other.shape
    if not left or not right:
        raise NetworkError("a matrix product needs at least one dimension on both sides")
    inner: Size = right[0] if len(right) == 1 else right[-2]
    if left[-1] != inner:
        require_equal(left[-1], inner, f"{show(left)} · {show(right)}")
    require_same_dtype("operands", self, other)
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    return (((*broadcast(left[:-2], right[:-2]), *rows, *columns), self.dtype),)


def addmm(self: Tensor, left: Tensor, right: Tensor, *rest: Any) -> Types:
    ((shape, dtype),) = matmul(left, right)
    require_same_dtype("operands", self, left)
    if broadcast(self.shape, shape) != shape:
        raise NetworkError(f"{show(self.shape)} does not broadcast to {show(shape)}")
    return ((shape, dtype),)


def outer(self: Tensor, other: Tensor) -> Types:
    return (((*self.shape, *other.shape), promote(self.dtype, other.dtype)),)


def einsum(equation: str, tensors: Sequence[Tensor], path: Any = None) -> Types:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        raise NetworkError(f"einsum {equation!r}: only the explicit form `ab,bc->ac` is known")
    terms = inputs.split(",")
    if len(terms) != len(tensors):
        raise NetworkError(f"einsum {equation!r} with {len(tensors)} operands")
    sizes: dict[str, Size] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        if len(term) != len(tensor.shape):
            raise NetworkError(f"einsum {equation!r}: {term} names {show(tensor.shape)}")
        for letter, size in zip(term, tensor.shape, strict=True):
            if letter in sizes and sizes[letter] != 1 and size != 1:
                require_equal(sizes[letter], size, f"einsum index {letter}")
            elif letter not in sizes or sizes[letter] == 1:
                sizes[letter] = size
    require_same_dtype("operands", *tensors)
    return ((tuple(sizes[letter] for letter in output), tensors[0].dtype),)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Types:
    require_same_dtype("operands", query, key, value)
    require_equal(query.shape[-1], key.shape[-1], "head size of query and key")
    return ((replaced(query.shape, len(query.shape) - 1, value.shape[-1]), query.dtype),)


RULES = table(
    {
        "linear": linear,
        "mm": mm,
        "bmm": bmm,
        "matmul dot mv": matmul,
        "addmm baddbmm addmv": addmm,
        "outer": outer,
        "einsum": einsum,
        "scaled_dot_product_attention": scaled_dot_product_attention,
    }
)
