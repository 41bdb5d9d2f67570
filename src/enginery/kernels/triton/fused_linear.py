"""`enginery::linear` and `enginery::norm_linear` on NVIDIA GPUs: which kernels do them, by rows and weight dtype.

Few rows (decoding) go to our kernels, which are bound by the bytes of the weight; more to cuBLAS, with the norm before
and the gate behind as kernels of their own. On Hopper GPUs there are two more: for one row, with norm and gate inside,
and for gated products of up to 128 rows. One row is not rounded for weights of 8 bits where a kernel can do without:
rounding would take a kernel of its own, and save none of the bytes that count.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from enginery.kernels.triton.add_rms_norm import add_rms_norm, add_rms_norm_float8
from enginery.kernels.triton.cublas import Cublas
from enginery.kernels.triton.float8 import quantised
from enginery.kernels.triton.hopper import hopper_gated, hopper_row
from enginery.kernels.triton.linear import FEW_FEATURES, skinny_linear, skinny_norm_linear
from enginery.kernels.triton.silu_mul import scaled_silu_mul, silu_mul
from enginery.ops.precision import MULTIPLE

MOST_NORMED_ROWS = 1
"""Above this, a norm has a kernel of its own."""
WIDE = 8192
"""A weight of more features than this is cut into so many programs that they keep up with cuBLAS for longer."""


def most_rows(weight: torch.Tensor) -> int:
    """Above this, cuBLAS is taken: more rows are not bound by the bytes of the weight alone, as measured on an H200."""
    return 64 if weight.element_size() == 1 or weight.shape[0] > WIDE else 32


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    cublas: Cublas,
) -> torch.Tensor:
    """The contract of `enginery::linear`."""
    rows = _rows(input)
    if _takes(hopper_row, rows, weight):
        result = hopper_row.row_linear(rows, weight, bias, scale)
    elif scale is None or not _fits_float8(rows, weight):
        result = _product(rows, weight, bias, scale, cublas, gated=False)
    elif rows.shape[0] == 1 and weight.shape[0] <= FEW_FEATURES:
        result = skinny_linear(rows, weight, bias, scale)
    else:
        result = _float8(*quantised(rows), weight, bias, scale, input.dtype, cublas, gated=False)
    return result.view(*input.shape[:-1], result.shape[1])


def norm_linear(
    input: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    gated: bool = False,
    *,
    cublas: Cublas,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `enginery::norm_linear`."""
    rows = _rows(input)
    others = residual.reshape(rows.shape)
    if _takes(hopper_row, rows, weight):
        result, total = hopper_row.norm_row_linear(rows, others, norm_weight, eps, weight, bias, scale, gated=gated)
    elif scale is None and _is_skinny(rows, weight, MOST_NORMED_ROWS):
        result, total = skinny_norm_linear(rows, others, norm_weight, eps, weight, bias, gated=gated)
    elif scale is not None and _fits_float8(rows, weight):
        normed, scales, total = add_rms_norm_float8(rows, others, norm_weight, eps)
        result = _float8(normed, scales, weight, bias, scale, input.dtype, cublas, gated=gated)
    else:
        normed, total = add_rms_norm(rows, others, norm_weight, eps)
        result = _product(normed, weight, bias, scale, cublas, gated=gated)
    return result.view(*input.shape[:-1], result.shape[1]), total.view(input.shape)


def _rows(input: torch.Tensor) -> torch.Tensor:
    """`[M, K]`"""
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])


def _is_skinny(rows: torch.Tensor, weight: torch.Tensor, most: int) -> bool:
    fits = rows.element_size() == 2 and rows.dtype == weight.dtype and weight.is_contiguous()
    return fits and 0 < rows.shape[0] <= most


def _takes(kernel: ModuleType | None, rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Of the kernels for Hopper."""
    return kernel is not None and kernel.takes(rows, weight)


def _product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    cublas: Cublas,
    *,
    gated: bool,
) -> torch.Tensor:
    if scale is not None:
        weight = _widened(weight, scale, rows.dtype)
    elif gated and _takes(hopper_gated, rows, weight):  # not what was just written: it does not wait for weights
        return hopper_gated.gated_linear(rows, weight, bias)
    if _is_skinny(rows, weight, most_rows(weight)):
        return skinny_linear(rows, weight, bias, gated=gated)
    result = cublas.linear(rows, weight, bias)
    return silu_mul(result) if gated else result


def _float8(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    dtype: torch.dtype,
    cublas: Cublas,
    *,
    gated: bool,
) -> torch.Tensor:
    if gated and dtype == torch.bfloat16 and _takes(hopper_gated, rows, weight):
        return hopper_gated.gated_linear(rows, weight, bias, scale, input_scale=row_scale)
    if rows.shape[0] <= most_rows(weight):
        return skinny_linear(rows, weight, bias, scale, input_scale=row_scale, dtype=dtype, gated=gated)
    if gated:
        return scaled_silu_mul(cublas.unscaled(rows, weight), row_scale, scale, bias, dtype)
    return cublas.float8(rows, row_scale, weight, scale, bias, dtype)


def _fits_float8(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the matrix units take the product, inputs rounded."""
    capable = not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 9)
    fits = weight.is_contiguous() and all(size % MULTIPLE == 0 for size in weight.shape)
    return capable and fits and rows.shape[0] > 0 and rows.element_size() == 2


def _widened(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float8 weight for products of another dtype: slow, where there is nothing better."""
    return (weight.to(torch.float32) * scale.view(-1, 1)).to(dtype)
