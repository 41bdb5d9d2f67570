"""The GPU's skinny linear layers against float64: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("rows", [17, 32, 50])
@pytest.mark.parametrize("features", [64, 37])
def test_more_rows_than_sixteen(rows: int, features: int) -> None:
    input = torch.randn(rows, 96, device=DEVICE).half()
    weight = torch.randn(features, 96, device=DEVICE).half()
    tiles = kernels.Tiles("tiles", 16, 32, 4, 2)
    close(kernels.skinny_linear(input, weight, tiles=tiles), input.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("features", [4096, 6144, 28672])
@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
def test_the_tiles_that_are_chosen_fit_into_shared_memory(rows: int, features: int, shared_memory: int) -> None:
    tiles = kernels.choose_tiles(rows, features, 2, shared_memory)
    columns = kernels.padded(rows) if tiles.kernel == "tiles" else rows
    assert (tiles.block_n + columns) * tiles.block_k * 2 * tiles.num_stages <= shared_memory
    assert tiles.num_stages >= 2


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


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (17, 16), (65, 16), (0, 16)])
def test_linear_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    input, weight = torch.randn(shape, device=DEVICE), torch.randn(24, 16, device=DEVICE)
    actual = kernels.linear(input, weight)
    expected = torch.nn.functional.linear(input.double(), weight.double())
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from enginery.kernels.triton import linear

def compiled(kernel, **constants):
    names = kernel.arg_names
    types = {"rows": "i32", "features": "i32", "input_stride": "i32"}
    pointers = ("input", "weight", "scale", "bias", "output")
    signature = {name: "*bf16" if name in pointers else types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={})

shared = dict(DEPTH=4096, SCALES=0, HAS_BIAS=True)
for kernel, extra in (
    (linear.linear_rows, dict(ROWS=1, BLOCK_N=8, BLOCK_K=512, STAGES=3)),
    (linear.linear_tiles, dict(ROWS=32, BLOCK_N=64, BLOCK_K=128, STAGES=8, PRECISION="tf32")),
):
    code = compiled(kernel, **shared, **extra)
    parts = ("cp.async.cg", "st.global")
    print(code.metadata.shared, *sorted(parts, key=code.asm["ptx"].index))
"""


def test_the_code_for_a_gpu_streams_its_weights_in_stages(tmp_path: Path) -> None:
    """Compiled for compute capability 9.0 without a GPU, by another process, for this one may interpret."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    order = "cp.async.cg st.global"
    shared, orders = zip(*(line.split(" ", 1) for line in done.stdout.splitlines()), strict=True)
    assert orders == (order, order)
    assert max(map(int, shared)) <= kernels.H200_SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 32, 48])
def test_a_chain_in_a_graph_reads_what_was_written_before(rows: int) -> None:
    """Every replay has another input: a value that an earlier one left would show."""
    features = 2048
    weights = [(torch.randn(features, features, device="cuda") / features**0.5).bfloat16() for _ in range(6)]
    source = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)

    def chain(function, hidden):
        for index, weight in enumerate(weights):
            hidden = function(hidden, weight)
            hidden = hidden * 2 if index == 2 else hidden  # another kernel in between
        return hidden

    chain(kernels.linear, source)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(kernels.linear, source)
    for _ in range(20):
        source.copy_(torch.randn(rows, features, device="cuda"))
        graph.replay()
        expected = chain(torch.nn.functional.linear, source)
        torch.testing.assert_close(output.float(), expected.float(), rtol=0.05, atol=0.05)
