"""Rounding to 8-bit floats, and products of them: on a GPU if there is one, else interpreted, or by torch's CPU."""

from __future__ import annotations

import pytest
import torch

from enginery.ops.add_rms_norm import rms_norm

from .triton_device import DEVICE, check_replays, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import add_rms_norm, float8

UNIT = torch.ones((), device=DEVICE)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def narrow(*shape: int) -> torch.Tensor:
    return (randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def rounds(narrow: torch.Tensor, scale: torch.Tensor, wide: torch.Tensor, slack: float = 0.0) -> None:
    """`narrow` · `scale` of each row is the nearest to `wide`: off by 2⁻⁴ of itself at most, or, below the normal
    numbers, by half the least one. `slack` is how far the values that were rounded may be off `wide`."""
    assert (narrow.dtype, narrow.shape, scale.dtype) == (torch.float8_e4m3fn, wide.shape, torch.float32)
    flat, scale = wide.reshape(-1, wide.shape[-1]), scale.double()
    maximum = flat.abs().amax(1)
    torch.testing.assert_close(scale, maximum.clamp(min=1e-12) / 448, rtol=1e-6 + slack, atol=0)
    step = torch.maximum(flat.abs() * 2**-4, scale[:, None] * 2**-10) * 1.00001 + slack * flat.abs()
    assert ((narrow.view(flat.shape).double() * scale[:, None] - flat).abs() <= step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 100), (1, 4096)], ids=str)
def test_a_row_is_rounded_by_a_scale_of_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows a hundred times as large as others, and magnitudes from the subnormal numbers to the largest."""
    x = (randn(*shape).exp() * randn(*shape).sign() * randn(shape[0], 1) * 100).to(dtype)
    rounds(*float8.quantised(x), x.double())


def test_rows_of_zeros_rows_with_a_stride_and_no_rows() -> None:
    x = randn(6, 96)[:, 32:]
    x[2] = 0
    rounds(*float8.quantised(x), x.double())
    rounds(*float8.quantised(x.T), x.T.double())
    narrow, scale = float8.quantised(x[:, :0].reshape(0, 64))
    assert (narrow.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 100), (1, 4096), (0, 64)], ids=str)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    normed, scale, total = add_rms_norm.add_rms_norm_float8(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert scale.shape == (x.numel() // shape[-1],)
    if x.numel() > 0:
        rounds(normed, scale, rms_norm(total.double(), weight.double(), 1e-5), slack=1e-5)


def test_add_rms_norm_of_rows_with_a_stride() -> None:
    x, residual, weight = randn(4, 96)[:, 32:], randn(64, 4).T, randn(64)
    normed, scale, total = add_rms_norm.add_rms_norm_float8(x, residual, weight, 1e-6)
    rounds(normed, scale, rms_norm(total.double(), weight.double(), 1e-6), slack=1e-5)


@pytest.mark.parametrize("features", [48, 1300], ids=["one program", "two programs"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scales_of_rows_and_columns(features: int, per_channel: bool, has_bias: bool) -> None:
    product = randn(3, features, dtype=torch.bfloat16)
    row_scale, scale, bias = randn(3), randn(features if per_channel else 1), randn(features, dtype=torch.bfloat16)
    output = torch.empty_like(product)
    float8.apply_scales[(3, -(-features // float8.BLOCK))](
        product, row_scale, scale, bias, output,
        SCALES=scale.numel(), HAS_BIAS=has_bias, WIDTH=features, BLOCK=float8.BLOCK, OVERLAP=False,
    )  # fmt: skip
    expected = product.double() * row_scale.double()[:, None] * scale.double() + bias.double() * has_bias
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.fixture(params=[True, False], ids=["by rows", "by itself"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether cuBLAS applies the scales, or a pass of ours."""
    monkeypatch.setattr(float8, "by_rows", lambda *_: request.param)


def check_product(rows: int, features: int, depth: int, per_channel: bool, has_bias: bool, dtype: torch.dtype) -> None:
    input, weight, bias = narrow(rows, depth), narrow(features, depth), randn(features, dtype=dtype)
    row_scale, scale = (torch.rand(size, device=DEVICE) / 100 for size in (rows, features if per_channel else 1))
    found = float8.float8_product(input, row_scale, weight, scale, bias if has_bias else None, dtype, UNIT)
    assert found.dtype == dtype
    left, right = input.double() * row_scale.double()[:, None], weight.double() * scale.double().view(-1, 1)
    expected = left @ right.T
    # The product may be in bfloat16 before the bias comes; a matrix unit may sum with 14 bits.
    bound = expected.abs() * 2**-7 + (left.abs() @ right.abs().T) * 2**-9
    expected += bias.double() * has_bias
    assert ((found.double() - expected).abs() <= bound + expected.abs() * 2**-8).all()


@pytest.mark.parametrize(
    ("features", "filling", "wasteful"),
    [
        (4096, (400, 512, 896, 1500), (65, 256, 640, 1100)),
        (6144, (544, 640, 1024), (65, 384, 768)),
        (28672, (65, 700), ()),
    ],
)
def test_cublas_applies_scales_where_its_tiles_fill_the_gpu(features: int, filling: tuple, wasteful: tuple) -> None:
    assert all(float8.by_rows(rows, features, 132) for rows in filling)
    assert not any(float8.by_rows(rows, features, 132) for rows in wasteful)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("features", "depth"), [(48, 32), (32, 96)])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(features: int, depth: int, rows: int, per_channel: bool, has_bias: bool, dtype: torch.dtype) -> None:
    check_product(rows, features, depth, per_channel, has_bias, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("features", "depth"), [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("rows", [65, 256, 2048])
def test_product_of_real_sizes(features: int, depth: int, rows: int) -> None:
    check_product(rows, features, depth, True, True, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("features", "depth"), [(48, 32), (32, 96)])
@pytest.mark.parametrize("rows", [4, 300])
def test_a_graph_can_hold_it(features: int, depth: int, rows: int) -> None:
    """Every replay has another input: a value that an earlier one left would show."""
    source, weight, scale = torch.zeros(rows, depth, device="cuda"), narrow(features, depth), randn(features)

    def product() -> torch.Tensor:
        return float8.float8_product(*float8.quantised(source), weight, scale, None, torch.bfloat16, UNIT)

    check_replays(product, lambda: source.copy_(randn(rows, depth)), times=5)
