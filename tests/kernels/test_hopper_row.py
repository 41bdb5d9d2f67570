"""The linear layer of one row for Hopper: when it is chosen, and on such a GPU its results against float64.

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
    from enginery.kernels.triton.cublas import Cublas
    from enginery.kernels.triton.gpu import Gpu

if kernels.hopper_row is None:
    pytest.skip("the kernel is written for Triton 3.6", allow_module_level=True)
hopper_row = kernels.hopper_row

EPS = 1e-5
HALF = torch.float16
KINDS = [(torch.bfloat16, torch.bfloat16), (HALF, HALF), (torch.bfloat16, FLOAT8), (HALF, FLOAT8)]
"""dtypes of the row and of the weight"""


# When it is chosen


def takes(
    rows: int = 1,
    features: int = 6144,
    depth: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    input_dtype: torch.dtype = torch.bfloat16,
) -> bool:
    input = torch.empty(rows, depth, dtype=input_dtype, device="meta")
    return hopper_row.takes(input, torch.empty(features, depth, dtype=dtype, device="meta"))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hopper_row, 132, (9, 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_have_the_general_kernels(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes()  # nor has a device that is none
    pretend(monkeypatch, hopper_row, 132, capability)
    assert not takes()
    pretend(monkeypatch, hopper_row, 132, (9, 0))
    assert takes()


@pytest.mark.usefixtures("on_hopper")
def test_it_has_one_row() -> None:
    assert [rows for rows in range(5) if takes(rows)] == [1]


@pytest.mark.usefixtures("on_hopper")
def test_weights_are_of_the_rows_dtype_or_of_8_bits() -> None:
    assert takes(dtype=FLOAT8)
    assert takes(dtype=torch.float16, input_dtype=torch.float16)
    assert takes(dtype=FLOAT8, input_dtype=torch.float16)
    assert not takes(dtype=torch.float16)
    assert not takes(dtype=torch.float32, input_dtype=torch.float32)
    assert not takes(dtype=FLOAT8, input_dtype=torch.float32)


@pytest.mark.usefixtures("on_hopper")
def test_depth_is_whole_blocks_of_512_bytes_and_bounded() -> None:
    assert [depth for depth in (0, 128, 256, 512, 768, 4096 + 128, 16384, 16640) if takes(depth=depth)] == [
        256, 512, 768, 16384,
    ]  # fmt: skip
    assert [depth for depth in (256, 512, 768, 1536) if takes(depth=depth, dtype=FLOAT8)] == [512, 1536]


@pytest.mark.usefixtures("on_hopper")
def test_it_takes_weights_that_tma_can_address() -> None:
    data = torch.zeros(1 << 16, dtype=torch.bfloat16)
    place = -data.data_ptr() // 2 % 8
    input = data[:512].view(1, 512)
    assert hopper_row.takes(input, data[place:].as_strided((64, 512), (512, 1)))
    assert not hopper_row.takes(input, data[place + 4 :].as_strided((64, 512), (512, 1)))
    assert not hopper_row.takes(input, data[place:].as_strided((64, 512), (520, 1)))
    # Torch calls a single row contiguous, whatever its stride.
    assert hopper_row.takes(input, data[place:].as_strided((1, 512), (512, 1)))
    assert not hopper_row.takes(input, data[place:].as_strided((1, 512), (513, 1)))
    assert not hopper_row.takes(input, data[place:].as_strided((0, 512), (512, 1)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Which operands the operators give the kernel."""
    made: list[tuple[Any, ...]] = []

    def plain(input, weight, bias=None, scale=None):
        made.append(("row", bias, scale))
        return input.new_zeros(1, len(weight))

    def normed(input, residual, norm_weight, eps, weight, bias=None, scale=None, *, gated=False):
        made.append(("norm", bias, scale, gated, eps))
        return input.new_zeros(1, len(weight) // (2 if gated else 1)), input + residual

    pretend(monkeypatch, hopper_row, 132, (9, 0))
    double = SimpleNamespace(takes=hopper_row.takes, row_linear=plain, norm_row_linear=normed)
    monkeypatch.setattr(kernels, "hopper_row", double)
    return made


def test_products_of_one_row_go_to_it(calls: list[tuple[Any, ...]]) -> None:
    input, norm_weight = torch.randn(1, 1, 512, device=DEVICE).bfloat16(), torch.ones(512, device=DEVICE)
    bias, scale = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
    weight = torch.randn(64, 512, device=DEVICE)
    assert kernels.linear(input, weight.bfloat16(), bias, cublas=Cublas()).shape == (1, 1, 64)
    assert kernels.linear(input, weight.to(FLOAT8), None, scale, cublas=Cublas()).shape == (1, 1, 64)
    found, total = kernels.norm_linear(
        input, input, norm_weight, EPS, weight.to(FLOAT8), bias, scale, gated=True, cublas=Cublas()
    )
    assert (found.shape, total.shape) == ((1, 1, 32), (1, 1, 512))
    assert calls == [("row", bias, None), ("row", None, scale), ("norm", bias, scale, True, EPS)]


def test_more_rows_go_elsewhere(calls: list[tuple[Any, ...]]) -> None:
    input, weight = torch.randn(2, 512, device=DEVICE).bfloat16(), torch.randn(64, 512, device=DEVICE).bfloat16()
    kernels.linear(input, weight, cublas=Cublas())
    kernels.norm_linear(input, input, torch.ones(512, device=DEVICE).bfloat16(), EPS, weight, cublas=Cublas())
    assert calls == []


def test_another_triton_keeps_to_the_general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "hopper_row", None)
    input, weight = torch.randn(1, 512, device=DEVICE).bfloat16(), torch.randn(64, 512, device=DEVICE).bfloat16()
    assert kernels.linear(input, weight, cublas=Cublas()).shape == (1, 64)
    norm_weight = torch.ones(512, device=DEVICE).bfloat16()
    found, _ = kernels.norm_linear(input, input, norm_weight, EPS, weight, gated=True, cublas=Cublas())
    assert found.shape == (1, 32)


# What it computes


class Operands(NamedTuple):
    input: torch.Tensor
    residual: torch.Tensor
    norm_weight: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None

    def run(self, *, norm: bool, gated: bool) -> torch.Tensor:
        """With the sum of input and residual behind the result, if there is a norm."""
        rest = (self.weight, self.bias, self.scale)
        if not norm:
            return hopper_row.row_linear(self.input, *rest)
        return torch.cat(hopper_row.norm_row_linear(*self[:3], EPS, *rest, gated=gated), 1)

    def expected(self, *, norm: bool, gated: bool) -> torch.Tensor:
        """In float64; the sum is rounded to its dtype before it is squared."""
        total = (self.input + self.residual).double()
        row = self.input.double()
        if norm:
            row = total * torch.rsqrt((total * total).mean() + EPS) * self.norm_weight.double()
        result = row @ self.weight.double().T
        if self.scale is not None:
            result *= self.scale.double()
        if self.bias is not None:
            result += self.bias.double()
        result = silu_gate(result) if gated else result
        return torch.cat((result, total), 1) if norm else result


Kind = tuple[torch.dtype, torch.dtype]


def draw(features: int, depth: int, kind: Kind, *, has_bias: bool = False, scales: int | None = None) -> Operands:
    """`features`: of the weight. What lies before and behind the operands is NaN."""
    if not Gpu.of(DEVICE).is_hopper:
        pytest.skip("needs compute capability 9.0")
    wide, dtype = kind
    rows = torch.full((3, 2 * depth), torch.nan, device=DEVICE, dtype=wide)
    rows[:, :depth] = torch.randn(3, depth, device=DEVICE)
    weight = torch.full((features + 64, depth), torch.nan, device=DEVICE)
    weight[32:-32] = torch.randn(features, depth, device=DEVICE) / (1 if dtype == FLOAT8 else depth**0.5)
    bias = torch.randn(features, device=DEVICE).to(wide) if has_bias else None
    scale = (0.5 + torch.rand(scales or features, device=DEVICE)) / depth**0.5 if dtype == FLOAT8 else None
    input, residual, norm_weight = (row[:depth] for row in rows)
    operands = Operands(input[None], residual[None], norm_weight, weight.to(dtype)[32:-32], bias, scale)
    # The kernel does not wait for what writes weights.
    torch.cuda.synchronize()
    return operands


def compare(operands: Operands, *, norm: bool, gated: bool) -> None:
    """Rounding is 2⁻⁹ of a number at most, of the normed row and of the result."""
    found, expected = (each(norm=norm, gated=gated) for each in (operands.run, operands.expected))
    assert found.shape == expected.shape
    difference = found.double() - expected
    assert not difference.isnan().any(), difference.isnan().nonzero()[:5]
    assert difference.norm() < 0.006 * expected.norm()
    assert difference.abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("norm", "gated"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("features", "depth"), [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 1024)])
def test_layers_of_decoders(features: int, depth: int, norm: bool, gated: bool, kind: Kind) -> None:
    compare(draw(features, depth, kind, has_bias=gated), norm=norm, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("features", [2, 14, 16, 18, 130, 1000, 4226, 8456])
@pytest.mark.parametrize("gated", [False, True])
def test_features_that_do_not_fill_a_tile(features: int, gated: bool, kind: Kind) -> None:
    compare(draw(features, 1024, kind, has_bias=True), norm=True, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 7, 13, 32])
def test_depths_of_few_steps_and_of_many(blocks: int, kind: Kind) -> None:
    """Odd numbers of steps, fewer than the ring has slots, and more."""
    depth = blocks * 512 // kind[1].itemsize
    compare(draw(5000, depth, kind), norm=False, gated=False)
    compare(draw(5000, depth, kind), norm=True, gated=True)


@pytest.mark.gpu
def test_the_deepest_row() -> None:
    for kind in KINDS:
        compare(draw(300, hopper_row.DEEPEST, kind), norm=True, gated=False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_operands_that_lie_otherwise(kind: Kind) -> None:
    """Every second number of a longer row, a row between two boundaries of 16 bytes, and a norm in float32."""
    operands = draw(1000, 1024, kind)
    apart = torch.full((1, 2048), torch.nan, device=DEVICE, dtype=kind[0])
    shifted = torch.full((1, 1025), torch.nan, device=DEVICE, dtype=kind[0])
    apart[:, ::2], shifted[:, 1:] = operands.input, operands.residual
    others = operands._replace(input=apart[:, ::2], residual=shifted[:, 1:], norm_weight=operands.norm_weight.float())
    assert torch.equal(others.run(norm=True, gated=True), operands.run(norm=True, gated=True))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_one_scale_for_all_features(gated: bool) -> None:
    compare(draw(998, 1024, (torch.bfloat16, FLOAT8), has_bias=True, scales=1), norm=True, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gates_far_from_zero(kind: Kind) -> None:
    """Their exponentials overflow."""
    operands = draw(1280, 1024, kind)
    bias = torch.zeros(1280, device=DEVICE)
    bias[:640:2], bias[1:640:2] = -300.0, 300.0
    compare(operands._replace(bias=bias), norm=True, gated=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_calls_repeat_to_the_bit(kind: Kind) -> None:
    """A copying warp and others share memory: a race would show here, if not always."""
    operands = draw(28672, 4096, kind)
    first = operands.run(norm=True, gated=True)
    for _ in range(50):
        assert torch.equal(operands.run(norm=True, gated=True), first)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_chain_in_a_graph_reads_what_was_written_before(kind: Kind) -> None:
    """Launches overlap over several kernels, and every replay has another input: a value that an earlier one left would
    show. Weights that fit into the ring let the kernels behind them in before their own row is there."""
    sizes = [(2048, 2048), (4096, 2048), (2048, 2048), (2048, 2048)] * 3
    layers = [draw(features, depth, kind) for features, depth in sizes]
    source = torch.zeros_like(layers[0].input)

    def chain() -> torch.Tensor:
        hidden, total = source, source
        for layer, (features, _) in zip(layers, sizes, strict=True):
            rest = (layer.weight, layer.bias, layer.scale)
            if features == 4096:
                hidden, total = hopper_row.norm_row_linear(hidden, total, layer.norm_weight, EPS, *rest, gated=True)
            else:
                hidden = hopper_row.row_linear(hidden, *rest)
        return torch.cat((hidden, total), 1)

    check_replays(chain, lambda: source.normal_(), 20)
