"""The kernels of a GPU in the kernel table, and behind the dispatcher."""

from __future__ import annotations

import pytest
import torch

from enginery import ops
from enginery.kernels.table import TABLE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_table_says_so_and_loads_nothing() -> None:
    row = next(row for row in TABLE.load("cuda") if row.op == "paged_attention")
    assert (row.kernel, row.reason) == ("reference", "no NVIDIA GPU")


@pytest.mark.gpu
def test_the_dispatcher_calls_the_kernel_and_a_graph_can_hold_it() -> None:
    row = next(row for row in TABLE.load("cuda") if row.op == "paged_attention")
    assert row.kernel == "Triton"
    query, key, value = (torch.randn(2, heads, 64, device="cuda") for heads in (4, 2, 2))
    pools = torch.randn(2, 4, 2, 16, 64, device="cuda").unbind()
    slots = torch.tensor([16 + 5, 48 + 9], device="cuda")
    tables, start, lengths = (
        torch.tensor(data, dtype=torch.int32, device="cuda") for data in ([[1, 0], [2, 3]], [0, 1, 2], [6, 26])
    )
    arguments = (query, key, value, *pools, slots, tables, start, lengths, 0.125)
    expected = ops.reference(ops.paged_attention)(*arguments)
    torch.testing.assert_close(ops.paged_attention(*arguments), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.paged_attention(*arguments)
    graph.replay()
    torch.testing.assert_close(output, expected)


@pytest.mark.gpu
def test_linear_is_called_through_the_dispatcher() -> None:
    row = next(row for row in TABLE.load("cuda") if row.op == "linear")
    assert row.kernel == "Triton"
    for shape in ((1, 256), (2, 16, 256), (300, 256)):
        input = torch.randn(shape, device="cuda").bfloat16()
        weight, bias = torch.randn(96, 256, device="cuda").bfloat16(), torch.randn(96, device="cuda").bfloat16()
        torch.cuda.synchronize()  # the weight must be written before the call
        expected = ops.reference(ops.linear)(input.double(), weight.double(), bias.double())
        found = ops.linear(input, weight, bias).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
