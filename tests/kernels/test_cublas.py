"""The product of 8-bit floats on a GPU, against its reference."""

from __future__ import annotations

import pytest
import torch

from enginery import ops
from enginery.kernels import cublas
from enginery.kernels.table import TABLE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernel() -> None:
    row = next(row for row in TABLE.load("cuda") if row.op == "float8_linear")
    if row.kernel == "reference":
        pytest.skip(row.reason)


def narrow(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64), (300, 64), (0, 64), (4, 4096)])
@pytest.mark.parametrize("features", [16, 48, 24])
def test_product(shape: tuple[int, ...], features: int) -> None:
    """24 features are no multiple of 16: the reference takes them."""
    input, weight = narrow(*shape), narrow(features, shape[-1])
    found = ops.float8_linear(input, weight)
    expected = torch.nn.functional.linear(input.double(), weight.double())
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    # Rounding to bfloat16, and sums in the matrix unit's own precision: 14 bits of the largest term.
    bound = expected.abs() * 2**-8 + shape[-1] ** 0.5 * 2**-12 * 448**2
    assert ((found.double() - expected).abs() <= bound).all()


def test_a_graph_can_hold_it() -> None:
    input, weight = narrow(4, 64), narrow(32, 64)
    expected = ops.float8_linear(input, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.float8_linear(input, weight)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)
    assert cublas.MULTIPLE == 16
