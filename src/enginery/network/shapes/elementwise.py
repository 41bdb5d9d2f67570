"""Shape rules of elementwise operators."""

from __future__ import annotations

from typing import Any

import torch

from enginery.network.shapes.promotion import as_floating, result_type, result_type_of
from enginery.network.shapes.sizes import Types, broadcast, broadcast_all, table
from enginery.network.tensor import Tensor


def same(self: Tensor, *rest: Any) -> Types:
    return ((self.shape, self.dtype),)


def floating(self: Tensor, *rest: Any) -> Types:
    return ((self.shape, as_floating(self.dtype)),)


def square(self: Tensor) -> Types:
    return ((self.shape, torch.int64 if self.dtype == torch.bool else self.dtype),)


def boolean(self: Tensor, *rest: Any) -> Types:
    return ((self.shape, torch.bool),)


def _shape(left: Any, right: Any) -> tuple:
    if type(right) is not Tensor:
        return left.shape
    if type(left) is not Tensor:
        return right.shape
    return left.shape if left.shape == right.shape else broadcast(left.shape, right.shape)


def binary(left: Any, right: Any, *rest: Any) -> Types:
    return ((_shape(left, right), result_type(left, right)),)


def quotient(left: Any, right: Any) -> Types:
    return ((_shape(left, right), as_floating(result_type(left, right))),)


def rounded_quotient(left: Any, right: Any, rounding_mode: str | None) -> Types:
    return quotient(left, right) if rounding_mode is None else binary(left, right)


def comparison(left: Any, right: Any, *rest: Any) -> Types:
    return ((_shape(left, right), torch.bool),)


def shift(left: Any, right: Any) -> Types:
    return binary(left, right)


def where(condition: Tensor, left: Any, right: Any) -> Types:
    shapes = [value.shape for value in (condition, left, right) if type(value) is Tensor]
    return ((broadcast_all(shapes), result_type(left, right)),)


def masked_fill(self: Tensor, mask: Tensor, value: Any) -> Types:
    return ((broadcast(self.shape, mask.shape), self.dtype),)


def clamp(self: Tensor, low: Any, high: Any = None) -> Types:
    bounds = [value for value in (low, high) if value is not None]
    shape = broadcast_all([self.shape, *(value.shape for value in bounds if type(value) is Tensor)])
    return ((shape, result_type_of([self, *bounds])),)


def pointwise(self: Any, *operands: Any) -> Types:
    """Three operands, such as lerp and addcmul; a last number is a factor."""
    tensors = [value for value in (self, *operands) if type(value) is Tensor]
    return ((broadcast_all([tensor.shape for tensor in tensors]), result_type_of(tensors)),)


RULES = table(
    {
        "neg abs relu relu6 silu gelu leaky_relu elu hardswish hardsigmoid hardtanh mish selu celu softplus "
        "sign ceil floor round round.decimals trunc bitwise_not positive "
        "alias detach clone contiguous dropout tril triu lift_fresh lift_fresh_copy "
        "fill.Scalar fill.Tensor zero resolve_conj resolve_neg nan_to_num flip roll": same,
        "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan sinh cosh tanh asin acos atan sigmoid erf erfc "
        "erfinv reciprocal log_sigmoid special_expit logit": floating,
        "square": square,
        "isnan isinf isfinite logical_not isneginf isposinf signbit": boolean,
        "add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Tensor mul.Scalar rsub.Tensor rsub.Scalar maximum minimum "
        "pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor "
        "fmod.Tensor fmod.Scalar floor_divide floor_divide.Scalar max.other min.other fmax fmin "
        "bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor "
        "bitwise_xor.Scalar "
        "__and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar __xor__.Tensor __xor__.Scalar "
        "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor "
        "bitwise_right_shift.Tensor_Scalar __lshift__.Scalar __lshift__.Tensor __rshift__.Scalar "
        "__rshift__.Tensor": binary,
        "div.Tensor div.Scalar true_divide.Tensor true_divide.Scalar atan2": quotient,
        "div.Tensor_mode div.Scalar_mode": rounded_quotient,
        "eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar "
        "ge.Tensor ge.Scalar logical_and logical_or logical_xor isclose": comparison,
        "where.self where.ScalarOther where.ScalarSelf where.Scalar": where,
        "masked_fill.Scalar masked_fill.Tensor": masked_fill,
        "clamp clamp.Tensor clamp_min clamp_min.Tensor clamp_max clamp_max.Tensor": clamp,
        "lerp.Tensor addcmul addcdiv": pointwise,
    }
)
