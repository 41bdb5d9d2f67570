"""The GPU's kernels for what lies between products, against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from enginery.ops.add_rms_norm import add_rms_norm_reference
from enginery.ops.silu_mul import silu_mul_reference

from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import add_rms_norm, silu_mul

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    atol = TOLERANCE[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 100), (1, 4096)], ids=str)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    weight = randn(shape[-1], dtype=dtype)
    normed, total = add_rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    close(total, x.double() + residual.double())
    zero = torch.zeros_like(total).double()
    expected, _ = add_rms_norm_reference(total.double(), zero, weight.double(), 1e-5)
    assert normed.dtype == dtype
    close(normed, expected)


def test_add_rms_norm_of_rows_with_a_stride_and_a_wide_weight() -> None:
    x, residual = randn(4, 96, dtype=torch.bfloat16)[:, 32:], randn(4, 64, dtype=torch.bfloat16)
    weight = randn(64, dtype=torch.float32)
    normed, _ = add_rms_norm.add_rms_norm(x, residual, weight, 1e-6)
    close(normed, add_rms_norm_reference(x, residual, weight, 1e-6)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (1, 2, 4000)], ids=str)
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = randn(*shape, dtype=dtype) * 3
    close(silu_mul.silu_mul(gate_up), silu_mul_reference(gate_up.double()))


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 2, 16, device=DEVICE)
    assert add_rms_norm.add_rms_norm(empty, empty, torch.ones(16, device=DEVICE), 1e-5)[0].shape == empty.shape
    assert silu_mul.silu_mul(empty).shape == (0, 2, 8)
