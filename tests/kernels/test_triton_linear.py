"""The GPU's skinny linear layers against float64: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from enginery.ops.add_rms_norm import rms_norm
from enginery.ops.silu_mul import silu_gate

from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import linear as kernels

ROWS, TILED = kernels.Tiles("rows", 4, 64, 4, 1), kernels.Tiles("tiles", 16, 32, 4, 2)
TILES = [ROWS, kernels.Tiles("rows", 8, 32, 4, 3), TILED]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    atol = TOLERANCE[actual.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def narrow(*shape: int) -> torch.Tensor:
    return (randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def exact(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    result = torch.nn.functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
    return silu_gate(result) if gated else result


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("features", "depth"), [(24, 128), (37, 80)], ids=["even", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(tiles: kernels.Tiles, rows: int, features: int, depth: int, dtype: torch.dtype) -> None:
    input, weight, bias = (randn(*shape, dtype=dtype) for shape in ((rows, depth), (features, depth), (features,)))
    close(kernels.skinny_linear(input, weight, bias, tiles=tiles), exact(input, weight, bias, False))


@pytest.mark.parametrize("rows", [17, 32, 50])
@pytest.mark.parametrize("features", [64, 37])
def test_more_rows_than_sixteen(rows: int, features: int) -> None:
    input, weight = randn(rows, 96, dtype=torch.float16), randn(features, 96, dtype=torch.float16)
    close(kernels.skinny_linear(input, weight, tiles=TILED), exact(input, weight, None, False))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("features", [32, 26], ids=["even", "ragged"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated(tiles: kernels.Tiles, rows: int, features: int, has_bias: bool) -> None:
    """Neither half of a ragged output ends where a tile does."""
    input, weight = randn(rows, 64, dtype=torch.float16), randn(features, 64, dtype=torch.float16) / 8
    bias = randn(features, dtype=torch.float16) if has_bias else None
    found = kernels.skinny_linear(input, weight, bias, gated=True, tiles=tiles)
    close(found, exact(input, weight, bias, True))


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("features", [4096, 6144, 28672])
@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
def test_the_tiles_that_are_chosen_fit_into_shared_memory(
    rows: int, features: int, itemsize: int, shared_memory: int
) -> None:
    tiles = kernels.choose_tiles(rows, features, itemsize, shared_memory)
    columns = kernels.padded(rows) if tiles.kernel == "tiles" else rows
    assert (tiles.block_n + columns) * tiles.block_k * itemsize * tiles.num_stages <= shared_memory
    assert tiles.num_stages >= 2


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_strides(tiles: kernels.Tiles) -> None:
    """Of rows, of columns, and of what a kernel reads by a pointer alone."""
    weight, bias = randn(20, 64), randn(1).expand(20)
    for input in (randn(5, 192)[:, 64:128], randn(64, 5).T):
        close(kernels.skinny_linear(input, weight, bias, tiles=tiles), exact(input, weight, bias, False))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float8(tiles: kernels.Tiles, per_channel: bool, gated: bool, dtype: torch.dtype) -> None:
    """The operands are exact. A matrix unit may sum with 14 bits: 2⁻⁹ of the sum of magnitudes covers this depth."""
    input, weight, bias = narrow(4, 128), narrow(24, 128), randn(24, dtype=dtype)
    scale = torch.rand(24 if per_channel else 1, device=DEVICE) / 4000
    input_scale = torch.rand(4, device=DEVICE) / 40
    found = kernels.skinny_linear(
        input, weight, bias, scale, input_scale=input_scale, dtype=dtype, gated=gated, tiles=tiles
    )
    wide = input.double() * input_scale.double()[:, None], weight.double() * scale.double().view(-1, 1)
    expected = exact(*wide, bias, gated)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    sums, magnitudes = exact(*wide, bias, False), wide[0].abs() @ wide[1].abs().T
    bound = magnitudes * 2**-9
    if gated:  # no slope of silu is above 1.1
        (_, ups), (gate_bound, up_bound) = sums.chunk(2, -1), bound.chunk(2, -1)
        silu = torch.nn.functional.silu(sums.chunk(2, -1)[0])
        bound = 1.1 * gate_bound * (ups.abs() + up_bound) + silu.abs() * up_bound
    assert ((found.double() - expected).abs() <= bound + expected.abs() * 2**-7 + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_before_the_product(rows: int, gated: bool, has_bias: bool, dtype: torch.dtype) -> None:
    """84 is no multiple of the tile's depth. The total is that of torch to the last bit; every program has its own."""
    input, residual = randn(rows, 200, dtype=dtype)[:, 100:184], randn(84, rows, dtype=dtype).T
    norm_weight, weight = randn(84), randn(22, 84, dtype=dtype) / 9
    bias = randn(22, dtype=dtype) if has_bias else None
    found, total = kernels.skinny_norm_linear(input, residual, norm_weight, 1e-5, weight, bias, gated=gated, tiles=ROWS)
    assert torch.equal(total, input + residual)
    close(found, exact(rms_norm(total.double(), norm_weight.double(), 1e-5), weight, bias, gated))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_row_does_not_depend_on_the_others(tiles: kernels.Tiles, dtype: torch.dtype) -> None:
    input, weight = narrow(16, 64).to(dtype), narrow(20, 64).to(dtype)
    linear = kernels.skinny_linear
    together = linear(input, weight, dtype=torch.float32, tiles=tiles)
    torch.testing.assert_close(
        linear(input[:9], weight, dtype=torch.float32, tiles=tiles), together[:9], rtol=0, atol=0
    )


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from enginery.kernels.triton import linear

NUMBERS = {"rows": "i32", "features": "i32", "input_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
WIDE = {"scale": "*fp32", "input_scale": "*fp32"}

def compiled(kernel, operands, tiles, capability=90, **constants):
    constants |= dict(BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, STAGES=tiles.num_stages, DEPTH=4096, HAS_BIAS=True)
    constants |= dict(AHEAD=linear.AHEAD, OVERLAP=capability >= 90)
    constants |= dict(INPUT_SCALES=operands != "bf16", SCALES=2 if operands != "bf16" else 0)
    names = kernel.arg_names
    types = NUMBERS | WIDE | dict(input="*" + operands, weight="*" + operands) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*bf16") for name in names}
    numbers = ("constexpr", "fp32")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] not in numbers}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tiles.num_warps})

def show(code):
    text = code.asm["ptx"]
    products = set(re.findall("(wgmma|mma)[.].*[.]f32[.](bf16|e4m3)[.]", text))
    print(code.metadata.shared, text.index("cp.async.cg") < text.index("st.global"), *sum(products, ()))

ADA = 99 << 10
for gated in (False, True):
    for norm in (False, True):
        show(compiled(linear.linear_rows, "bf16", linear.NORM_TILES, ROWS=1, NORM=norm, GATED=gated))
    for operands, capability, memory in (("bf16", 90, 227 << 10), ("fp8e4nv", 90, 227 << 10), ("fp8e4nv", 89, ADA)):
        tiles = linear.choose_tiles(32, 4096, 2 if operands == "bf16" else 1, memory)
        more = dict(ROWS=32, GATED=gated, PRECISION="tf32")
        show(compiled(linear.linear_tiles, operands, tiles, capability, **more))
"""


def test_the_code_for_a_gpu_streams_its_weights_in_stages_and_multiplies_8_bits_as_they_are(tmp_path: Path) -> None:
    """Compiled without a GPU, for an H100 and for one of 8.9, by another process, for this one may interpret."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", COMPILE]
    done = subprocess.run(run, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared, kinds = zip(*(line.split(" ", 1) for line in done.stdout.splitlines()), strict=True)
    assert kinds == ("True", "True", "True wgmma bf16", "True wgmma e4m3", "True mma e4m3") * 2
    for bytes_of_program, limit in zip(shared, [227 << 10, 227 << 10, 227 << 10, 227 << 10, 99 << 10] * 2, strict=True):
        assert int(bytes_of_program) <= limit
