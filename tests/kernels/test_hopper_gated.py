"""The gated linear layer for Hopper: when it is chosen, and on such a GPU its results against float64.

Gluon has no interpreter: without a GPU its arithmetic is only compiled (`test_triton_compiles.py`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from enginery.ops.precision import FLOAT8
from enginery.ops.silu_mul import silu_gate

from .triton_device import DEVICE, check_replays, kernels_for_device, pretend

with kernels_for_device():
    from enginery.kernels.triton import fused_linear as kernels
    from enginery.kernels.triton.add_rms_norm import add_rms_norm, add_rms_norm_float8
    from enginery.kernels.triton.float8 import quantised
    from enginery.kernels.triton.gpu import Gpu

if kernels.hopper_gated is None:
    pytest.skip("the kernel is written for Triton 3.6", allow_module_level=True)
hopper_gated = kernels.hopper_gated

DTYPES = [torch.bfloat16, FLOAT8]


# When it is chosen


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hopper_gated, 132, (9, 0))


def takes(
    rows: int = 96,
    features: int = 28672,
    depth: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    input_dtype: torch.dtype | None = None,
) -> bool:
    input = torch.empty(rows, depth, dtype=input_dtype or dtype, device="meta")
    return hopper_gated.takes(input, torch.empty(features, depth, dtype=dtype, device="meta"))


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize(("dtype", "fastest"), [(torch.bfloat16, range(65, 129)), (FLOAT8, range(33, 65))])
def test_it_has_the_rows_for_which_it_is_fastest(dtype: torch.dtype, fastest: range) -> None:
    assert [rows for rows in range(300) if takes(rows, dtype=dtype)] == list(fastest)


@pytest.mark.usefixtures("on_h200")
def test_its_programs_run_at_once_and_fill_the_gpu() -> None:
    """A tile is of 64 features and their gates; the last one of a weight may be part of a tile."""
    least, most = 2 * 64 * 198, 2 * 64 * 264
    assert takes(features=least)
    assert takes(features=least - 126)
    assert takes(features=most)
    assert not takes(features=least - 128)
    assert not takes(features=most + 2)
    assert [takes(50, 128 * tiles, dtype=FLOAT8) for tiles in (125, 126, 1000)] == [False, True, True]


@pytest.mark.usefixtures("on_h200")
def test_depth_is_whole_blocks_of_128_bytes() -> None:
    assert takes(depth=64)
    assert takes(50, depth=128, dtype=FLOAT8)
    assert not takes(depth=4096 + 32)
    assert not takes(50, depth=4096 + 64, dtype=FLOAT8)
    assert not takes(depth=0)


@pytest.mark.usefixtures("on_h200")
def test_other_dtypes_go_elsewhere() -> None:
    assert not takes(dtype=torch.float16)
    assert not takes(dtype=torch.float32)
    assert not takes(50, dtype=FLOAT8, input_dtype=torch.bfloat16)
    assert not takes(dtype=torch.bfloat16, input_dtype=torch.float32)


@pytest.mark.usefixtures("on_h200")
def test_it_takes_rows_that_tma_can_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hopper_gated, 1, (9, 0))
    data = torch.zeros(1 << 16, dtype=torch.bfloat16)
    place = -data.data_ptr() // 2 % 8
    input = data[place:].as_strided((96, 64), (72, 1))
    weight = data[place:].as_strided((256, 64), (64, 1))
    assert hopper_gated.takes(input, weight)
    assert not hopper_gated.takes(data[place + 4 :].as_strided((96, 64), (72, 1)), weight)
    assert not hopper_gated.takes(input, data[place + 4 :].as_strided((256, 64), (64, 1)))
    for strides in ((68, 1), (1, 96), (0, 1)):
        assert not hopper_gated.takes(data[place:].as_strided((96, 64), strides), weight), strides
    assert not hopper_gated.takes(input, data[place:].as_strided((256, 64), (72, 1)))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_no_other_gpu_has_its_matrix_units(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes()  # nor has a device that is none
    pretend(monkeypatch, hopper_gated, 132, capability)
    assert not takes()
    pretend(monkeypatch, hopper_gated, 132, (9, 0))
    assert takes()


def library() -> dict[str, Any]:
    """What the operators are given beside the contract's arguments."""
    from enginery.kernels.triton.cublas import Cublas

    return {"cublas": Cublas()}


def calls_of(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *, rows: int = 96, features: int = 256, **options: Any
) -> list[tuple[Any, ...]]:
    """Which tensors `norm_linear` gives the kernel, on a Hopper of one multiprocessor."""
    calls = []

    def note(input, weight, bias, scale=None, *, input_scale=None):
        calls.append((input.dtype, bias, scale, input_scale))
        return input.new_zeros(len(input), len(weight) // 2, dtype=torch.bfloat16)

    pretend(monkeypatch, hopper_gated, 1, (9, 0))
    monkeypatch.setattr(kernels, "hopper_gated", SimpleNamespace(takes=hopper_gated.takes, gated_linear=note))
    settings: dict[str, Any] = {"gated": True, "bias": None, "scale": None, "input": torch.bfloat16} | options
    input = torch.randn(rows, 128, device=DEVICE).to(settings.pop("input"))
    weight = torch.randn(features, 128, device=DEVICE).to(dtype)
    kernels.norm_linear(input, input, torch.ones(128, device=DEVICE), 1e-5, weight, **settings, **library())
    return calls


def test_gated_products_go_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.zeros(256, device=DEVICE)
    assert calls_of(monkeypatch, torch.bfloat16, bias=bias) == [(torch.bfloat16, bias, None, None)]


def test_gated_products_in_8_bits_go_to_it_with_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    [(dtype, bias, scale, row_scale)] = calls_of(monkeypatch, FLOAT8, rows=50, scale=torch.ones(256, device=DEVICE))
    assert (dtype, bias, scale.shape, row_scale.shape) == (FLOAT8, None, (256,), (50,))


@pytest.mark.parametrize("case", ["plain", "few rows", "float16", "float16 of 8 bits", "written just before"])
def test_others_go_elsewhere(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = torch.ones(256, device=DEVICE)
    calls = {
        "plain": lambda: calls_of(monkeypatch, torch.bfloat16, gated=False),
        "few rows": lambda: calls_of(monkeypatch, torch.bfloat16, rows=20),
        "float16": lambda: calls_of(monkeypatch, torch.float16, input=torch.float16),
        "float16 of 8 bits": lambda: calls_of(monkeypatch, FLOAT8, rows=50, input=torch.float16, scale=scale),
        # Sides that are no multiples of 16: the weight is widened first, and the kernel would not wait for that.
        "written just before": lambda: calls_of(monkeypatch, FLOAT8, rows=50, features=248, scale=scale[:248]),
    }
    assert calls[case]() == []


def test_another_triton_keeps_to_the_general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "hopper_gated", None)
    input, weight = torch.randn(96, 128, device=DEVICE).bfloat16(), torch.randn(256, 128, device=DEVICE).bfloat16()
    found, _ = kernels.norm_linear(input, input, torch.ones(128, device=DEVICE), 1e-5, weight, gated=True, **library())
    assert found.shape == (96, 128)


# What it computes


class Operands(NamedTuple):
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    input_scale: torch.Tensor | None

    def run(self) -> torch.Tensor:
        return hopper_gated.gated_linear(*self[:4], input_scale=self.input_scale)

    def expected(self) -> torch.Tensor:
        """In float64."""
        result = self.input.double() @ self.weight.double().T
        if self.scale is not None and self.input_scale is not None:
            result *= self.scale.double() * self.input_scale.double()[:, None]
        return silu_gate(result if self.bias is None else result + self.bias.double())


def draw(
    rows: int, features: int, depth: int, dtype: torch.dtype, *, has_bias: bool = False, scales: int | None = None
) -> Operands:
    """`features`: of the output. What lies behind the operands is NaN."""
    if not Gpu.of(DEVICE).is_hopper:
        pytest.skip("needs compute capability 9.0")
    input, weight = (torch.randn(size + 128, depth, device=DEVICE) for size in (rows, 2 * features))
    weight = weight if dtype == FLOAT8 else weight / depth**0.5
    input[rows:] = weight[2 * features :] = torch.nan
    bias = scale = input_scale = None
    if has_bias:
        bias = torch.randn(2 * features, device=DEVICE).bfloat16()
    if dtype == FLOAT8:
        scale = (0.5 + torch.rand(scales or 2 * features, device=DEVICE)) / depth**0.5
        input_scale = 0.5 + torch.rand(rows, device=DEVICE)
    operands = Operands(input.to(dtype)[:rows], weight.to(dtype)[: 2 * features], bias, scale, input_scale)
    # The kernel does not wait for what writes weights.
    torch.cuda.synchronize()
    return operands


def compare(operands: Operands) -> None:
    """Also rows and columns by themselves: a wrong one must not drown. Rounding is 2⁻⁹ of a number at most.

    The matrix units add up float8 products of depth 4096 with 14 bits or so. Then the worst of 14,336 columns is off by
    0.7 to 1.2 % in 150 draws, and by as much with cuBLAS.
    """
    actual, expected = operands.run(), operands.expected()
    assert actual.shape == expected.shape
    difference = actual.double() - expected
    assert not difference.isnan().any(), difference.isnan().nonzero()[:5]
    assert difference.norm() < 0.004 * expected.norm()
    most = 0.02 if operands.weight.dtype == FLOAT8 else 0.01
    for side in (0, 1):
        sizes = expected.norm(dim=side)
        errors = difference.norm(dim=side) / sizes.clamp(min=sizes.mean())
        assert errors.max() < most, (side, (errors >= most).nonzero()[:5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [33, 47, 63, 64, 65, 77, 96, 127, 128])
def test_rows(rows: int, dtype: torch.dtype) -> None:
    operands = draw(rows, 14336, 4096, dtype)
    compare(operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [8, 63, 64, 65, 200, 999, 8456])
@pytest.mark.parametrize("has_bias", [False, True])
def test_features_that_do_not_fill_a_tile(features: int, dtype: torch.dtype, has_bias: bool) -> None:
    """Its gates then run into the rows of up, and its ups past the end."""
    for rows in (50, 100):
        operands = draw(rows, features, 1024, dtype, has_bias=has_bias)
        compare(operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 32])
def test_depths_of_few_steps_and_of_many(steps: int, dtype: torch.dtype) -> None:
    """Fewer than the ring has slots, as many, and more."""
    for rows in (50, 100):
        operands = draw(rows, 300, steps * 128 // dtype.itemsize, dtype, has_bias=True)
        compare(operands)


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_scale_for_all_features(has_bias: bool) -> None:
    operands = draw(100, 999, 1024, FLOAT8, has_bias=has_bias, scales=1)
    compare(operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    """Their exponentials overflow."""
    operands = draw(80, 640, 1024, dtype)
    bias = torch.zeros(1280, device=DEVICE)
    bias[:640:2], bias[1:640:2] = -300.0, 300.0
    operands = operands._replace(bias=bias)
    found, expected = operands.run().double(), operands.expected()
    assert not found.isnan().any()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.005 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    operands = draw(100, 640, 1024, dtype, has_bias=True)
    wide = torch.full((100, 1280), torch.nan, device=DEVICE).to(dtype)
    wide[:, 128:1152] = operands.input
    assert torch.equal(operands._replace(input=wide[:, 128:1152]).run(), operands.run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [64, 128])
def test_a_row_does_not_depend_on_the_others(rows: int, dtype: torch.dtype) -> None:
    operands = draw(rows, 999, 1024, dtype, has_bias=True)
    expected = operands.run()
    changed = operands.input.float()
    changed[1::2] = torch.nan
    found = operands._replace(input=changed.to(dtype)).run()
    assert torch.equal(found[::2], expected[::2])
    assert found[1::2].isnan().all()
    fewer = operands._replace(
        input=operands.input[: rows - 5],
        input_scale=None if operands.input_scale is None else operands.input_scale[: rows - 5],
    )
    assert torch.equal(fewer.run(), expected[: rows - 5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [64, 128])
def test_calls_repeat_to_the_bit(rows: int, dtype: torch.dtype) -> None:
    """A copying warp and a warpgroup share memory: a race would show here, if not always."""
    operands = draw(rows, 14336, 4096, dtype)
    first = operands.run()
    for _ in range(50):
        assert torch.equal(operands.run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [40, 128])
def test_a_chain_in_a_graph_reads_what_was_written_before(rows: int, dtype: torch.dtype) -> None:
    """Launches overlap, and every replay has another input: a value that an earlier one left would show."""
    layers = [draw(rows, 2048, 2048, dtype) for _ in range(6)]
    norm_weight = torch.ones(2048, device=DEVICE).bfloat16()
    source = torch.zeros(rows, 2048, device=DEVICE).bfloat16()

    def chain() -> torch.Tensor:
        hidden, total = source, source
        for place, layer in enumerate(layers):
            scales = None
            if place % 3 == 2:  # the product right behind another, or behind what rounds its result
                normed, scales = quantised(hidden) if dtype == FLOAT8 else (hidden, None)
            elif dtype == FLOAT8:
                normed, scales, total = add_rms_norm_float8(hidden, total, norm_weight, 1e-5)
            else:
                normed, total = add_rms_norm(hidden, total, norm_weight, 1e-5)
            hidden = layer._replace(input=normed, input_scale=scales).run()
        return hidden

    check_replays(chain, lambda: source.normal_(), times=20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_takes_it_and_gives_what_the_other_kernels_give(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = hopper_gated.BOUNDS[dtype].rows[-1]
    layer = draw(rows, 14336, 4096, dtype)
    assert hopper_gated.takes(layer.input, layer.weight)
    input, norm_weight = torch.randn(rows, 4096, device=DEVICE).bfloat16(), torch.ones(4096, device=DEVICE).bfloat16()
    arguments = (input, input, norm_weight, 1e-5, layer.weight, None, layer.scale, True)
    found, total = kernels.norm_linear(*arguments, **library())
    monkeypatch.setattr(kernels, "hopper_gated", None)
    expected, other_total = kernels.norm_linear(*arguments, **library())
    assert torch.equal(total, other_total)
    # The other way rounds gates and ups, too.
    assert (found.double() - expected.double()).norm() < 0.01 * expected.double().norm()
