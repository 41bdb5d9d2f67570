"""How fast are a model's linear layers on a GPU, alone and with the norm before and the gate behind, beside cuBLAS?

    python benchmarks/gpu_linears.py [--write]
    python benchmarks/gpu_linears.py --tune bf16|float8|norm

The shapes are those of Llama-3.1-8B (hidden 4096, intermediate 14336, vocabulary 128256); weights in bfloat16, and in
8 bits with a scale for each output. All times are microseconds, each the median over replays of a CUDA graph that
holds calls on several weights, so that none is left in the L2 cache.

    operator     as a model calls it: enginery::linear or norm_linear, inputs in bfloat16
    ours         our kernel for up to 64 rows; it takes inputs of the weight's dtype, or a norm before it, and includes
                 the gate
    streamed     our kernel for gated layers on Hopper, behind a norm (`hopper_gated.py`)
    cublas       its product; norm and gate have kernels of their own. In 8 bits, with all scales and with none
    norm inside  our kernel with norm and gate in one
    least        what reading the weight takes by the rate of a reduction

`layer` is a decoder layer's chain of four products with its norms and its gate, without attention. `--tune` times the
candidates for the tiles of our kernels instead, and keeps the six fastest.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from enginery.kernels.triton import fused_linear
from enginery.kernels.triton.add_rms_norm import add_rms_norm, add_rms_norm_float8
from enginery.kernels.triton.cublas import Cublas
from enginery.kernels.triton.float8 import quantised
from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.linear import (
    NORM_TILES,
    Tiles,
    choose_tiles,
    padded,
    skinny_linear,
    skinny_norm_linear,
)
from enginery.kernels.triton.silu_mul import scaled_silu_mul, silu_mul
from gpu_timing import L2_BYTES, compile_all, read_bandwidth, seconds
from record import record

DEVICE = torch.device("cuda")
CUBLAS = Cublas()
PROJECTIONS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
LAYER = ("qkv", "o", "gate_up", "down")
NORMED = {"qkv": False, "gate_up": True}
"""those with a norm before them; whether a gate is behind"""
ROWS = (1, 8, 16, 32, 64, 96, 128)
MOST_SKINNY_ROWS = 64
"""for which our kernels in Triton are made"""
EPS = 1e-5

Ways = dict[str, Callable[[torch.Tensor, torch.Tensor | None], object]]
"""What does a job, called with a weight and its scale."""


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def new_weight(features: int, depth: int, float8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = randn(features, depth)
    if float8:
        return (weight * 64).to(torch.float8_e4m3fn), torch.full((features,), 1 / 64 / depth**0.5, device=DEVICE)
    return weight / depth**0.5, None


def weights_for(features: int, depth: int, float8: bool) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """So many that none stays in the L2 until its next turn."""
    copies = max(2, -(-5 * L2_BYTES // (features * depth * (1 if float8 else 2))))
    return [new_weight(features, depth, float8) for _ in range(copies)]


def microseconds(weights: list[tuple[torch.Tensor, torch.Tensor | None]], way: Callable) -> float:
    return round(seconds([partial(way, *weight) for weight in weights]) * 1e6, 2)


@dataclass(frozen=True)
class Case:
    """One of our kernels as it is compiled; how many features there are does not matter."""

    tiles: Tiles
    rows: int
    depth: int
    float8: bool = False
    gated: bool = False
    norm: bool = False

    @classmethod
    def of(cls, tiles: Tiles, rows: int, depth: int, **more: bool) -> Case:
        return cls(tiles, padded(rows) if tiles.kernel == "tiles" else rows, depth, **more)

    def run(self) -> None:
        self.call(randn(self.rows, self.depth))(*new_weight(256, self.depth, self.float8))

    def call(self, input: torch.Tensor) -> Callable:
        """Of a weight and its scale."""
        if self.norm:
            return partial(norm_inside, input, input, randn(self.depth), gated=self.gated, tiles=self.tiles)
        if self.float8:
            return partial(skinny_float8, *quantised(input), gated=self.gated, tiles=self.tiles)
        return partial(skinny, input, gated=self.gated, tiles=self.tiles)


def skinny(input, weight, scale, **options):
    return skinny_linear(input, weight, scale=scale, **options)


def skinny_float8(input, input_scale, weight, scale, **options):
    return skinny_linear(input, weight, scale=scale, input_scale=input_scale, dtype=torch.bfloat16, **options)


def norm_inside(input, residual, norm_weight, weight, scale, **options):
    return skinny_norm_linear(input, residual, norm_weight, EPS, weight, **options)


def scaled_mm(input, scales, unit, weight, scale):
    """With the scales of rows and columns, or with none."""
    left, right = (unit, unit) if scales is None else (scales.view(-1, 1), scale.view(1, -1))
    return torch._scaled_mm(input, weight.t(), left, right, out_dtype=torch.bfloat16, use_fast_accum=True)


def linear_operator(input, cublas, weight, scale):
    return fused_linear.linear(input, weight, None, scale, cublas=cublas)


def norm_linear_operator(input, residual, norm_weight, cublas, gated, weight, scale):
    return fused_linear.norm_linear(input, residual, norm_weight, EPS, weight, None, scale, gated, cublas=cublas)


def cublas_linear(input, cublas, weight, scale):
    if scale is None:
        return cublas.linear(input, weight)
    return cublas.float8(*quantised(input), weight, scale, None, torch.bfloat16)


def cublas_norm_linear(input, residual, norm_weight, cublas, gated, weight, scale):
    """Norm and gate have a kernel each."""
    if scale is None:
        normed, total = add_rms_norm(input, residual, norm_weight, EPS)
        result = cublas.linear(normed, weight)
        return (silu_mul(result) if gated else result), total
    narrow, row_scale, total = add_rms_norm_float8(input, residual, norm_weight, EPS)
    if gated:
        return scaled_silu_mul(cublas.unscaled(narrow, weight), row_scale, scale, None, torch.bfloat16), total
    return cublas.float8(narrow, row_scale, weight, scale, None, torch.bfloat16), total


def gate_inside(input, residual, norm_weight, gated, weight, scale):
    """The norm has a kernel of its own, the gate has none."""
    if scale is None:
        return skinny(add_rms_norm(input, residual, norm_weight, EPS)[0], weight, scale, gated=gated)
    narrow, row_scale, _ = add_rms_norm_float8(input, residual, norm_weight, EPS)
    return skinny_float8(narrow, row_scale, weight, scale, gated=gated)


def gate_streamed(input, residual, norm_weight, weight, scale):
    if scale is None:
        return fused_linear.hopper_gated.gated_linear(add_rms_norm(input, residual, norm_weight, EPS)[0], weight)
    narrow, row_scale, _ = add_rms_norm_float8(input, residual, norm_weight, EPS)
    return fused_linear.hopper_gated.gated_linear(narrow, weight, scale=scale, input_scale=row_scale)


def streams(rows: int, row_bytes: int) -> bool:
    """Whether there is the kernel of `gate_streamed` for so many rows."""
    hopper_gated = fused_linear.hopper_gated
    if hopper_gated is None or not Gpu.of(DEVICE).is_hopper:
        return False
    return rows <= max(each.rows[-1] for each in hopper_gated.BOUNDS.values()) and row_bytes % hopper_gated.LINE == 0


def linears(rows: int, depth: int, float8: bool) -> Ways:
    """The operator takes bfloat16; our kernel and cuBLAS alone take what the weight is of."""
    input, unit = randn(rows, depth), torch.ones((), device=DEVICE)
    ways: Ways = {
        "operator": partial(linear_operator, input, CUBLAS),
        "cublas measured": partial(cublas_linear, input, CUBLAS),
    }
    if not float8:
        ours = partial(skinny, input)
        ways["cublas"] = partial(cublas_linear, input, Cublas())
    else:
        narrow, row_scale = quantised(input)
        ours = partial(skinny_float8, narrow, row_scale)
        ways["cublas"] = partial(scaled_mm, narrow, row_scale, unit)
        ways["cublas unscaled"] = partial(scaled_mm, narrow, None, unit)
    return ways | {"ours": ours} if rows <= MOST_SKINNY_ROWS else ways


def norm_linears(rows: int, depth: int, float8: bool, gated: bool) -> Ways:
    norm = randn(rows, depth), randn(rows, depth), randn(depth)
    ways: Ways = {
        "operator": partial(norm_linear_operator, *norm, CUBLAS, gated),
        "cublas": partial(cublas_norm_linear, *norm, Cublas(), gated),
        "cublas measured": partial(cublas_norm_linear, *norm, CUBLAS, gated),
    }
    if rows <= MOST_SKINNY_ROWS:
        ways["ours"] = partial(gate_inside, *norm, gated)
    if gated and streams(rows, depth * (1 if float8 else 2)):
        ways["streamed"] = partial(gate_streamed, *norm)
    if rows == 1 and not float8:
        ways["norm inside"] = partial(norm_inside, *norm, gated=gated)
    return ways


def layer(rows: int, float8: bool, linear: Callable, norm_linear: Callable, cublas: Cublas, count: int = 6) -> float:
    """Microseconds of a layer's products, norms and gate, each of what the one before wrote."""
    weights = [[new_weight(*PROJECTIONS[name], float8) for name in LAYER] for _ in range(count)]
    hidden_size = PROJECTIONS["qkv"][1]
    source, norm_weight = randn(rows, hidden_size), randn(hidden_size)

    def run(qkv, o, gate_up, down):
        heads, total = norm_linear(source, source, norm_weight, cublas, False, *qkv)
        hidden = linear(heads[:, : o[0].shape[1]], cublas, *o)  # the queries, in place of attention's output
        gated, total = norm_linear(hidden, total, norm_weight, cublas, True, *gate_up)
        linear(gated, cublas, *down)

    return round(seconds([partial(run, *each) for each in weights]) * 1e6, 2)


def chosen() -> Iterator[Case]:
    """What `compare` runs of our kernels."""
    memory = Gpu.of(DEVICE).shared_memory
    numbers = [rows for rows in ROWS if rows <= MOST_SKINNY_ROWS]
    for (name, (features, depth)), rows, float8 in itertools.product(PROJECTIONS.items(), numbers, (False, True)):
        case = Case.of(choose_tiles(rows, features, 1 if float8 else 2, memory), rows, depth, float8=float8)
        yield case
        if name in NORMED:
            yield replace(case, gated=NORMED[name])
            yield Case.of(NORM_TILES, 1, depth, gated=NORMED[name], norm=True)


def compare(workers: int) -> dict:
    """Microseconds."""
    compile_all(Case.run, chosen(), workers)
    rate = read_bandwidth()
    results: dict = {}
    for float8, (name, (features, depth)) in itertools.product((False, True), PROJECTIONS.items()):
        weights, dtype = weights_for(features, depth, float8), "float8" if float8 else "bf16"
        least = {"least": round(features * depth * (1 if float8 else 2) / rate * 1e-6, 2)}
        for rows in ROWS:
            cases = {name: linears(rows, depth, float8)}
            if name in NORMED:
                fused = f"norm, {name}, gate" if NORMED[name] else f"norm, {name}"
                cases[fused] = norm_linears(rows, depth, float8, NORMED[name])
            for case, ways in cases.items():
                with CUBLAS.measuring():
                    ways["cublas measured"](*weights[0])
                times = {way: microseconds(weights, call) for way, call in ways.items()}
                results[f"{case}, {rows} rows, {dtype}"] = times | least
    for float8, rows in itertools.product((False, True), ROWS):
        results[f"layer, {rows} rows, {'float8' if float8 else 'bf16'}"] = {
            "operator": layer(rows, float8, linear_operator, norm_linear_operator, CUBLAS),
            "cublas": layer(rows, float8, cublas_linear, cublas_norm_linear, Cublas()),
        }
    return results


IN_REGISTERS = [
    Tiles("rows", *shape)
    for shape in (
        (8, 512, 4, 3), (8, 512, 4, 4), (8, 512, 4, 5), (4, 512, 4, 3), (4, 512, 4, 5), (4, 1024, 4, 3),
        (8, 1024, 8, 3), (16, 256, 4, 3), (16, 256, 4, 4), (16, 512, 8, 3), (8, 256, 4, 4), (8, 512, 4, 1),
    )
]  # fmt: skip
ON_TENSOR_CORES = [
    Tiles("tiles", *shape)
    for shape in (
        (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 6), (64, 128, 4, 8), (64, 256, 4, 4), (64, 64, 4, 8),
        (64, 64, 4, 12), (128, 64, 4, 8), (128, 64, 8, 6), (128, 128, 4, 4), (128, 128, 8, 4), (32, 256, 4, 5),
        (32, 512, 4, 3), (32, 128, 2, 6), (16, 256, 2, 3),
    )
]  # fmt: skip
IN_8_BITS = [
    Tiles("tiles", *shape) for shape in itertools.product((64, 128), (128, 256, 512), (4, 8), (3, 4, 5, 6, 8, 10))
]
TUNED_ROWS = {"bf16": (1, 16, 32, 64), "float8": (1, 32, 64), "norm": (1,)}
"""Up to 16 rows are the same to the tensor cores."""


def candidates(kind: str, rows: int, depth: int, gated: bool) -> list[Case]:
    """What fits into shared memory."""
    if kind == "norm":
        return [Case.of(tiles, rows, depth, gated=gated, norm=True) for tiles in IN_REGISTERS]
    tiles = IN_8_BITS if kind == "float8" else ON_TENSOR_CORES + (IN_REGISTERS if rows == 1 else [])
    cases = [Case.of(each, rows, depth, float8=kind == "float8") for each in tiles]
    return [case for case in cases if shared_memory(case) <= Gpu.of(DEVICE).shared_memory]


def shared_memory(case: Case) -> int:
    """Bytes of all stages."""
    tiles = case.tiles
    return (tiles.block_n + case.rows) * tiles.block_k * (1 if case.float8 else 2) * tiles.num_stages


def tune(kind: str, workers: int) -> dict:
    """Microseconds of the six fastest."""
    names = NORMED if kind == "norm" else dict.fromkeys(PROJECTIONS, False)
    shapes = itertools.product(names.items(), TUNED_ROWS[kind])
    cases = {(name, rows): candidates(kind, rows, PROJECTIONS[name][1], gated) for (name, gated), rows in shapes}
    good = compile_all(Case.run, itertools.chain.from_iterable(cases.values()), workers)
    results = {}
    for name in names:
        weights = weights_for(*PROJECTIONS[name], kind == "float8")
        for rows in TUNED_ROWS[kind]:
            input = randn(rows, PROJECTIONS[name][1])
            times = {case: microseconds(weights, case.call(input)) for case in cases[name, rows] if case in good}
            best = sorted(times, key=times.__getitem__)[:6]
            results[f"{name}, {rows} rows, {kind}"] = {shown(case.tiles): times[case] for case in best}
    return results


def shown(tiles: Tiles) -> str:
    return f"{tiles.kernel} {tiles.block_n} x {tiles.block_k}, {tiles.num_warps} warps, {tiles.num_stages} stages"


def places(row: dict[str, float]) -> dict[str, str]:
    """The tiles by place, for a table."""
    return {str(place): f"{time} us: {tiles}" for place, (tiles, time) in enumerate(row.items(), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", choices=TUNED_ROWS, help="time the candidates for these tiles instead")
    parser.add_argument("--workers", type=int, default=16, help="processes that compile (default: 16)")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    torch.manual_seed(0)
    CUBLAS.open(DEVICE)
    if options.tune:
        tuned = tune(options.tune, options.workers)
        table = {name: places(row) for name, row in tuned.items()}
        record(f"gpu_linears_{options.tune}", tuned, table=table, write=options.write)
        return
    record("gpu_linears", compare(options.workers), write=options.write)


if __name__ == "__main__":
    main()
