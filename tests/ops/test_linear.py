"""The linear operators: their references against float64, their shapes without data, and what torch expects."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery import ops
from enginery.network import Dim, Network

SHAPES = [(32,), (5, 32), (2, 3, 32), (0, 32)]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5, torch.float64: 1e-12}
"""of a result that is rounded once, relative to the largest"""


def narrow(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype] * largest)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_torch(bias: bool) -> None:
    input, weight, offset = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5) if bias else None
    assert torch.equal(ops.linear(input, weight, offset), F.linear(input, weight, offset))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("scales", [48, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_over_a_weight_of_8_bits(shape: tuple[int, ...], dtype: torch.dtype, scales: int, bias: bool) -> None:
    input, weight, scale = torch.randn(shape).to(dtype), narrow(48, 32), torch.rand(scales) / 100
    offset = torch.randn(48).to(dtype) if bias else None
    expected = F.linear(input.double(), weight.double() * scale.double()[:, None])
    close(ops.linear(input, weight, offset, scale), expected if offset is None else expected + offset.double(), dtype)


def test_products_beyond_float16_are_scaled_before_they_are_rounded() -> None:
    input, weight = torch.full((2, 64), 300.0).half(), torch.full((48, 64), 448.0).to(torch.float8_e4m3fn)
    found = ops.linear(input, weight, None, torch.full((48,), 2.0 / 448))
    torch.testing.assert_close(found, torch.full((2, 48), 38400.0).half())


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, *, quantised: bool, bias: bool, features: int = 48
) -> list[torch.Tensor | float | None]:
    """The arguments of norm_linear but the last."""
    depth = shape[-1]
    weight = narrow(features, depth) if quantised else torch.randn(features, depth).to(dtype)
    return [
        torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), (torch.rand(depth) + 0.5).to(dtype), 1e-5, weight,
        torch.randn(features).to(dtype) if bias else None, torch.rand(features) / 100 if quantised else None,
    ]  # fmt: skip


def exact(*arguments: torch.Tensor | float | None, gated: bool) -> torch.Tensor:
    """norm_linear's output in float64, of the sum as the dtype rounds it."""
    x, residual, norm_weight, eps, weight, bias, scale = arguments
    total = (x + residual).double()  # type: ignore[operator, union-attr]
    normed = F.rms_norm(total, total.shape[-1:], norm_weight.double(), eps)  # type: ignore[union-attr, arg-type]
    rows = weight.double() * (1.0 if scale is None else scale.double()[:, None])  # type: ignore[union-attr]
    output = F.linear(normed, rows, None if bias is None else bias.double())  # type: ignore[union-attr]
    if not gated:
        return output
    gate, up = output.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_norm_linear(shape: tuple[int, ...], dtype: torch.dtype, quantised: bool, gated: bool) -> None:
    arguments = operands(shape, dtype, quantised=quantised, bias=not gated)
    output, total = ops.norm_linear(*arguments, gated=gated)
    close(output, exact(*arguments, gated=gated), dtype)
    assert output.shape == (*shape[:-1], 24 if gated else 48)
    assert torch.equal(total, arguments[0] + arguments[1])


@pytest.mark.parametrize("gated", [True, False])
def test_norm_linear_is_the_three_operators_that_it_joins(gated: bool) -> None:
    arguments = operands((2, 3, 32), torch.float64, quantised=True, bias=True)
    output, total = ops.norm_linear(*arguments, gated=gated)
    normed, added = ops.add_rms_norm(*arguments[:4])
    apart = ops.linear(normed, *arguments[4:])
    torch.testing.assert_close(output, ops.silu_mul(apart) if gated else apart)
    assert torch.equal(total, added)


def test_a_norm_with_a_wider_weight() -> None:
    """Gemma's 1 + w is float32 in a bfloat16 network."""
    arguments = operands((5, 32), torch.bfloat16, quantised=False, bias=False)
    arguments[2] = torch.rand(32) + 0.5
    close(ops.norm_linear(*arguments)[0], exact(*arguments, gated=False), torch.bfloat16)


def test_shapes_of_symbolic_sizes() -> None:
    network = Network()
    tokens = Dim.symbol("tokens")
    x = network.add_input("x", (tokens, 32), torch.bfloat16)
    w = network.add_constant("w", (48, 32), torch.float8_e4m3fn)
    scale = network.add_constant("scale", (48,), torch.float32)
    norm = network.add_constant("norm", (32,), torch.bfloat16)
    y = ops.linear(x, w, None, scale)
    assert (y.shape, y.dtype) == ((tokens, 48), torch.bfloat16)
    for gated, features in ((False, 48), (True, 24)):
        output, total = ops.norm_linear(x, x, norm, 1e-5, w, None, scale, gated)
        assert (output.shape, output.dtype) == ((tokens, features), torch.bfloat16)
        assert (total.shape, total.dtype) == ((tokens, 32), torch.bfloat16)


@pytest.mark.parametrize("symbolic", [True, False])
def test_operators_can_be_exported(symbolic: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            output, total = ops.norm_linear(x, x, v[0], 1e-5, w, None, scale, gated=True)
            return ops.linear(output, v) + total

    arguments = (torch.randn(3, 24), narrow(48, 24), torch.randn(24, 24), torch.rand(48))
    shapes = ({0: torch.export.Dim("tokens")} if symbolic else None, None, None, None)
    program = torch.export.export(Module(), arguments, dynamic_shapes=shapes, strict=False)
    assert torch.equal(program.module()(*arguments), Module()(*arguments))


@pytest.mark.parametrize("quantised", [True, False])
def test_what_torch_expects_of_an_operator(quantised: bool) -> None:
    """Outputs that are no inputs, shapes that are those of the data."""
    arguments = operands((5, 32), torch.bfloat16, quantised=quantised, bias=True)
    checks = ("test_faketensor",) if quantised else ("test_faketensor", "test_schema")  # which multiplies its inputs
    torch.library.opcheck(ops.norm_linear, (*arguments, True), test_utils=checks)
    torch.library.opcheck(ops.linear, (arguments[0], *arguments[4:]), test_utils=checks)
