"""The GPU's skinny linear layers against float64: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import linear as kernels

TILES = [kernels.Tiles("rows", 4, 64, 4, 1), kernels.Tiles("rows", 8, 32, 4, 3), kernels.Tiles("tiles", 16, 32, 4, 2)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol = TOLERANCE[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("features", "depth"), [(24, 128), (37, 80)], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(tiles: kernels.Tiles, rows: int, features: int, depth: int, dtype: torch.dtype) -> None:
    input = torch.randn(rows, depth, device=DEVICE).to(dtype)
    weight = torch.randn(features, depth, device=DEVICE).to(dtype)
    bias = torch.randn(features, device=DEVICE).to(dtype)
    expected = torch.nn.functional.linear(input.double(), weight.double(), bias.double())
    close(kernels.skinny_linear(input, weight, bias, tiles=tiles), expected)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_rows_with_a_stride_and_without_bias(tiles: kernels.Tiles) -> None:
    input = torch.randn(5, 192, device=DEVICE)[:, 64:128]
    weight = torch.randn(20, 64, device=DEVICE)
    close(kernels.skinny_linear(input, weight, tiles=tiles), input.double() @ weight.double().T)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_float8_weights(tiles: kernels.Tiles, per_channel: bool) -> None:
    weight = torch.randn(24, 128, device=DEVICE)
    scale = (weight.abs().amax(1) if per_channel else weight.abs().amax().view(1)) / 448
    quantised = (weight / (scale[:, None] if per_channel else scale)).to(torch.float8_e4m3fn)
    input = torch.randn(4, 128, device=DEVICE).to(torch.float16)
    exact = quantised.double() * (scale[:, None] if per_channel else scale).double()
    close(kernels.skinny_linear(input, quantised, scale=scale, tiles=tiles), input.double() @ exact.T)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_a_row_does_not_depend_on_the_others(tiles: kernels.Tiles) -> None:
    input, weight = torch.randn(16, 64, device=DEVICE), torch.randn(20, 64, device=DEVICE)
    together = kernels.skinny_linear(input, weight, tiles=tiles)
    few = kernels.skinny_linear(input[:9], weight, tiles=tiles)
    torch.testing.assert_close(together[:9], few, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (17, 16), (0, 16)])
def test_linear_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    input, weight = torch.randn(shape, device=DEVICE), torch.randn(24, 16, device=DEVICE)
    actual = kernels.linear(input, weight)
    expected = torch.nn.functional.linear(input.double(), weight.double())
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
