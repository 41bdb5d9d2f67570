"""The linear operators: their references, their shapes without data, and what torch expects of an operator."""

from __future__ import annotations

import pytest
import torch

from enginery import ops
from enginery.network import Dim, Network


def narrow(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32)])
def test_float8_linear_is_the_product_of_what_its_operands_stand_for(shape: tuple[int, ...]) -> None:
    input, weight = narrow(*shape), narrow(48, 32)
    found = ops.float8_linear(input, weight)
    expected = torch.nn.functional.linear(input.double(), weight.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_torch(bias: bool) -> None:
    input, weight, offset = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5) if bias else None
    assert torch.equal(ops.linear(input, weight, offset), torch.nn.functional.linear(input, weight, offset))


def test_shapes_of_symbolic_sizes() -> None:
    network = Network()
    tokens = Dim.symbol("tokens")
    x = network.add_input("x", (tokens, 32), torch.float8_e4m3fn)
    w = network.add_constant("w", (48, 32), torch.float8_e4m3fn)
    y = ops.float8_linear(x, w)
    assert (y.shape, y.dtype) == ((tokens, 48), torch.bfloat16)
    v = network.add_constant("v", (16, 48), torch.bfloat16)
    assert ops.linear(y, v).shape == (tokens, 16)


@pytest.mark.parametrize("symbolic", [True, False])
def test_operators_can_be_exported(symbolic: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ops.linear(ops.float8_linear(x, w), v)

    arguments = (narrow(3, 32), narrow(48, 32), torch.randn(16, 48).bfloat16())
    shapes = ({0: torch.export.Dim("tokens")} if symbolic else None, None, None)
    program = torch.export.export(Module(), arguments, dynamic_shapes=shapes, strict=False)
    assert torch.equal(program.module()(*arguments), Module()(*arguments))
