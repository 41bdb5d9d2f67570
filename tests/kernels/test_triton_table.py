"""The kernels of a GPU in the kernel table, and behind the dispatcher."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from enginery import ops
from enginery.kernels.table import TABLE, TRITON


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
def test_all_that_the_table_names_is_registered() -> None:
    assert {row.op for row in TABLE.load("cuda") if row.kernel == "Triton"} == TRITON.ops


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 256), (2, 16, 256), (300, 256)], ids=str)
@pytest.mark.parametrize("is_float8", [False, True])
def test_linears_are_called_through_the_dispatcher(shape: tuple[int, ...], is_float8: bool) -> None:
    TABLE.load("cuda")
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    input, residual, norm_weight, weight, bias = make(shape), make(shape), make(256), make(96, 256), make(96)
    scale, wide_weight, part = None, weight.double(), 0.02
    if is_float8:  # inputs are rounded by 2⁻⁴ of themselves
        weight = wide_weight = (weight * 100).to(torch.float8_e4m3fn)
        scale, part = torch.full((96,), 0.01, device="cuda"), 0.3
    torch.cuda.synchronize()  # the weight must be written before the call
    wide = [each.double() for each in (input, residual, norm_weight)]
    expected = [ops.reference(ops.linear)(wide[0], wide_weight, bias.double(), scale)]
    expected += ops.reference(ops.norm_linear)(*wide, 1e-5, weight, bias, scale, True)
    found = [ops.linear(input, weight, bias, scale)]
    found += ops.norm_linear(input, residual, norm_weight, 1e-5, weight, bias, scale, True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=part * float(other.abs().max()))
