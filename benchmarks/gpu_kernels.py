"""How near do the GPU kernels come to the memory's and the matrix units' rate, and to cuDNN and cuBLAS?

    python benchmarks/gpu_kernels.py [--linear] [--tune] [--write]

The shapes are those of Llama-3.1-8B (32 query heads, 8 KV heads of 128, hidden 4096, intermediate 14336, vocabulary
128256) in bfloat16. A time is the median over replays of a CUDA graph that holds several calls on different data, so
that nothing is left in the L2 cache from one call to the next. `--tune` also times the candidates of all tile choices.
`--linear` times the projections alone, one by one and in a chain in which each reads what the one before wrote.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from enginery.kernels.triton import linear, paged_attention
from enginery.kernels.triton.linear import Tiles
from enginery.kernels.triton.paged_attention import LaunchPlan, Tiling, plan_launch
from record import record

HEADS, KV_HEADS, HEAD, BLOCK = 32, 8, 128, 16
SCALE = HEAD**-0.5
DECODE = ((1, 8192), (16, 8192), (128, 256), (256, 192))
PREFILL = (1024, 8192)
PROJECTIONS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 2, 4, 8, 16)
LINEAR_ROWS = (1, 8, 16, 32, 64)
LAYER = ("qkv", "o", "gate_up", "down")
L2_BYTES = 60 << 20


def seconds(calls: list[Callable], replays: int = 9) -> float:
    """Median time of one call, all of them captured in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[2:])


@dataclass
class Batch:
    """A call's tensors: sequences with `new` tokens each after `context` cached ones, and several layers' pools."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pools: list[tuple[torch.Tensor, torch.Tensor]]
    metadata: tuple[torch.Tensor, ...]

    @classmethod
    def random(cls, sequences: int, new: int, context: int, layers: int) -> Batch:
        tokens, width = sequences * new, -(-(context + new) // BLOCK)
        make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        shape = (sequences * width, KV_HEADS, BLOCK, HEAD)
        tables = torch.randperm(sequences * width, device="cuda").view(sequences, width).int()
        places = torch.arange(context, context + new, device="cuda")
        slots = (tables[:, places // BLOCK].long() * BLOCK + places % BLOCK).flatten()
        start = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * new
        lengths = torch.full((sequences,), context + new, device="cuda", dtype=torch.int32)
        heads = [make(tokens, count, HEAD) for count in (HEADS, KV_HEADS, KV_HEADS)]
        return cls(*heads, [(make(shape), make(shape)) for _ in range(layers)], (slots, tables, start, lengths))

    def calls(self, plan: LaunchPlan | None = None) -> list[Callable]:
        return [
            partial(
                paged_attention.paged_attention,
                self.query,
                self.key,
                self.value,
                *pool,
                *self.metadata,
                SCALE,
                plan=plan,
            )
            for pool in self.pools
        ]


def layers_for(sequences: int, context: int) -> int:
    """Pools enough that one call's cannot stay in the L2 until its next turn; at least eight calls a graph."""
    return max(8, -(-4 * L2_BYTES // (sequences * context * KV_HEADS * HEAD * 4)))


def default_plan(sequences: int, new: int, context: int) -> LaunchPlan:
    gpu = paged_attention.Gpu.of(torch.device("cuda", 0))
    return plan_launch(gpu, sequences * new, sequences, context, KV_HEADS, HEADS // KV_HEADS, HEAD, 2)


def decode(sequences: int, context: int, plans: Iterable[LaunchPlan | None]) -> dict[LaunchPlan | None, float]:
    """TB/s of keys and values read, `context` counting the new token."""
    batch = Batch.random(sequences, 1, context - 1, layers_for(sequences, context))
    volume = sequences * context * KV_HEADS * HEAD * 2 * 2
    return {plan: volume / seconds(batch.calls(plan)) / 1e12 for plan in plans}


def prefill(tokens: int, plans: Iterable[LaunchPlan | None]) -> dict[LaunchPlan | None, float]:
    """TFLOP/s of causal attention over one fresh sequence, the writing of the cache included."""
    batch = Batch.random(1, tokens, 0, 4)
    work = 4 * HEADS * HEAD * tokens * (tokens + 1) / 2
    return {plan: work / seconds(batch.calls(plan)) / 1e12 for plan in plans}


def sdpa_decode(sequences: int, context: int, backend: SDPBackend) -> float:
    """torch's attention over dense keys and values, in the same unit as `decode`."""
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    query = make(sequences, HEADS, 1, HEAD)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    shape = (sequences, KV_HEADS, context, HEAD)
    with sdpa_kernel(backend):
        calls = [partial(attend, query, make(shape), make(shape)) for _ in range(layers_for(sequences, context))]
        return sequences * context * KV_HEADS * HEAD * 4 / seconds(calls) / 1e12


def sdpa_prefill(tokens: int, backend: SDPBackend) -> float:
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    query, key, value = (make(1, count, tokens, HEAD) for count in (HEADS, KV_HEADS, KV_HEADS))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    with sdpa_kernel(backend):
        return 4 * HEADS * HEAD * tokens * (tokens + 1) / 2 / seconds([partial(attend, query, key, value)] * 4) / 1e12


def weights_for(features: int, depth: int) -> list[torch.Tensor]:
    copies = max(2, -(-5 * L2_BYTES // (features * depth * 2)))
    return [torch.randn(features, depth, device="cuda", dtype=torch.bfloat16) / depth**0.5 for _ in range(copies)]


def project(weights: list[torch.Tensor], rows: int, function: Callable) -> float:
    """TB/s of weights read."""
    input = torch.randn(rows, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    volume = weights[0].numel() * weights[0].element_size()
    return volume / seconds([partial(function, input, weight) for weight in weights]) / 1e12


def decode_candidates(splits: Iterable[int]) -> list[LaunchPlan]:
    shapes = [
        (16, 1, 4),
        (16, 1, 5),
        (16, 1, 8),
        (16, 2, 5),
        (16, 2, 8),
        (16, 4, 8),
        (32, 2, 5),
        (32, 4, 5),
        (64, 4, 5),
    ]
    base = default_plan(1, 1, 8192)
    return [
        replace(base, short=Tiling(16, *shape), splits=count, overlap=overlap)
        for shape, count, overlap in itertools.product(shapes, splits, (False, True))
        if count > 1 or not overlap
    ]


DECODE_SPLITS = {(1, 8192): (16, 32, 64), (16, 8192): (2, 4), (128, 256): (1, 2), (256, 192): (1,)}


def prefill_candidates() -> list[LaunchPlan]:
    shapes = [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (128, 32, 4, 3), (256, 64, 16, 2), (256, 32, 8, 3),
    ]  # fmt: skip
    return [replace(default_plan(1, 1024, 1024), long=Tiling(*shape)) for shape in shapes]


def linear_candidates(rows: int, itemsize: int) -> list[Tiles]:
    """Depths are those of 2-byte weights; a narrower weight has tiles of as many bytes."""
    in_registers = [
        (8, 512, 4, 3), (8, 512, 4, 4), (8, 512, 4, 5), (4, 512, 4, 3), (4, 512, 4, 5), (4, 1024, 4, 3),
        (8, 1024, 8, 3), (16, 256, 4, 3), (16, 512, 8, 3), (8, 256, 4, 4), (8, 512, 4, 1), (4, 1024, 4, 1),
    ]  # fmt: skip
    on_tensor_cores = [
        (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 6), (64, 128, 4, 8), (64, 256, 4, 4), (64, 64, 4, 8),
        (64, 64, 4, 12), (128, 64, 4, 8), (128, 128, 4, 4), (128, 128, 8, 4), (32, 256, 4, 5), (32, 256, 4, 6),
        (32, 512, 4, 3), (32, 128, 2, 6), (16, 256, 2, 3),
    ]  # fmt: skip
    candidates = [Tiles("tiles", n, k * 2 // itemsize, *rest) for n, k, *rest in on_tensor_cores]
    if rows <= 4:
        candidates += [Tiles("rows", n, k * 2 // itemsize, *rest) for n, k, *rest in in_registers]
    return candidates


@dataclass(frozen=True)
class LinearJob:
    """What decides a compilation: tiles, padded rows, depth, whether the weight is float8."""

    tiles: Tiles
    rows: int
    depth: int
    narrow: bool = False

    @classmethod
    def of(cls, tiles: Tiles, rows: int, depth: int, narrow: bool) -> LinearJob:
        return cls(tiles, rows if tiles.kernel == "rows" else linear.padded(rows), depth, narrow)


def compile_one(job: LaunchPlan | LinearJob) -> str:
    """Runs a candidate once on little data, for Triton's cache on disk; returns why it does not compile, or nothing."""
    try:
        if isinstance(job, LaunchPlan):
            batch = Batch.random(1, 1, 63, 1) if job.decode else Batch.random(1, 32, 0, 1)
            batch.calls(job)[0]()
        else:
            make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
            weight, scale = make(64, job.depth), None
            if job.narrow:
                weight, scale = weight.to(torch.float8_e4m3fn), torch.ones(64, device="cuda")
            linear.skinny_linear(make(job.rows, job.depth), weight, scale=scale, tiles=job.tiles)
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return f"{job}: {str(error).splitlines()[0]}"
    return ""


def compile_all(jobs: list, workers: int) -> list:
    """The jobs that compile."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(compile_one, jobs))
    for failure in filter(None, failures):
        print("does not compile:", failure[:150])
    return [job for job, failure in zip(jobs, failures, strict=True) if not failure]


def candidates() -> list[LaunchPlan | LinearJob]:
    splits = sorted({count for counts in DECODE_SPLITS.values() for count in counts})
    jobs: dict[LaunchPlan | LinearJob, None] = dict.fromkeys([*decode_candidates(splits), *prefill_candidates()])
    for rows, depth, narrow in itertools.product((1, 2, 4, 8), (4096, 14336), (False, True)):
        if not narrow or rows == 1:
            chosen = linear_candidates(rows, 1 if narrow else 2)
            jobs |= dict.fromkeys(LinearJob.of(tiles, rows, depth, narrow) for tiles in chosen)
    return list(jobs)


def tune(workers: int) -> dict:
    good = set(compile_all(candidates(), workers))
    results: dict = {}
    for (sequences, context), counts in DECODE_SPLITS.items():
        rates = decode(sequences, context, [plan for plan in decode_candidates(counts) if plan in good])
        results[f"decode {sequences} x {context}"] = ranked(
            {(p.short, p.splits, p.overlap): rate for p, rate in rates.items()}, 6
        )
    for tokens in PREFILL:
        rates = prefill(tokens, [plan for plan in prefill_candidates() if plan in good])
        results[f"prefill {tokens}"] = ranked({plan.long: rate for plan, rate in rates.items()}, 6)
    for (name, (features, depth)), narrow in itertools.product(PROJECTIONS.items(), (False, True)):
        weights, scale = weights_for(features, depth), None
        if narrow:
            weights = [weight.to(torch.float8_e4m3fn) for weight in weights for _ in range(2)]
            scale = torch.ones(features, device="cuda")
        for rows in (1, 16) if narrow else ROWS:
            usable = linear_candidates(rows, 1 if narrow else 2)
            usable = [tiles for tiles in usable if LinearJob.of(tiles, rows, depth, narrow) in good]
            run = {tiles: partial(linear.skinny_linear, scale=scale, tiles=tiles) for tiles in usable}
            rates = {tiles: project(weights, rows, function) for tiles, function in run.items()}
            results[f"{name} {rows} rows{' float8' if narrow else ''}"] = ranked(rates, 6)
    return results


def ranked(rates: dict, count: int) -> list[tuple[str, float]]:
    best = sorted(rates.items(), key=lambda item: -item[1])[:count]
    return [(str(key), round(rate, 3)) for key, rate in best]


def layer(rows: int, context: int, function: Callable, *, overlap: bool, layers: int = 6) -> float:
    """Microseconds of a layer's heavy kernels, one after another with small element-wise ones between, as in a model.

    `function(input, weight)` does the projections; `overlap` is for attention.
    """
    batch = Batch.random(rows, 1, context - 1, layers)
    attention = batch.calls(replace(default_plan(rows, 1, context), overlap=overlap))
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    weights = [[make(PROJECTIONS[name]) / 100 for name in LAYER] for _ in range(layers)]
    hidden, gated = make(rows, 4096), make(rows, 14336)

    def run(index: int) -> None:
        qkv, o, gate_up, down = weights[index]
        hidden.mul_(1.0)
        function(hidden, qkv)
        batch.query.mul_(1.0)
        attention[index]()
        function(hidden, o)
        hidden.mul_(1.0)
        function(hidden, gate_up)
        gated.mul_(1.0)
        function(gated, down)

    return seconds([partial(run, index) for index in range(layers)]) * 1e6


def wide_candidates(rows: int) -> list[Tiles]:
    """For more than 16 rows: what is taken up to 16, and wider or shallower tiles that fit into shared memory."""
    if rows <= 16:
        return []
    shapes = [(64, 128, 4, 8), (64, 128, 4, 6), (64, 128, 4, 4), (64, 64, 4, 12), (64, 64, 4, 8), (128, 64, 8, 6)]
    fits = [shape for shape in shapes if (shape[0] + rows) * shape[1] * 2 * shape[3] <= linear.H200_SHARED_MEMORY]
    return [Tiles("tiles", *shape) for shape in fits]


def compare_linears(workers: int) -> dict:
    """Microseconds of each projection, and of a layer's four in a chain: cuBLAS and ours."""
    cases = list(itertools.product(PROJECTIONS, LINEAR_ROWS))
    jobs = dict.fromkeys(job for name, rows in cases for job in linear_jobs(rows, *PROJECTIONS[name]))
    good = set(compile_all(list(jobs), workers))
    results: dict = {}
    for name, rows in cases:
        features, depth = PROJECTIONS[name]
        weights = weights_for(features, depth)
        run = {"cublas": torch.nn.functional.linear, "ours": linear.skinny_linear}
        times: dict = {way: microseconds(weights, rows, function) for way, function in run.items()}
        usable = [tiles for tiles in wide_candidates(rows) if LinearJob.of(tiles, rows, depth, False) in good]
        others = {t: microseconds(weights, rows, partial(linear.skinny_linear, tiles=t)) for t in usable}
        for tiles in sorted(others, key=lambda tiles: others[tiles])[:1]:
            times |= {"best": others[tiles], "tiles": (tiles.block_n, tiles.block_k, tiles.num_warps, tiles.num_stages)}
        results[f"{name} {rows} rows, us"] = times
    for rows in LINEAR_ROWS:
        run = {"cublas": torch.nn.functional.linear, "ours": linear.skinny_linear, "enginery::linear": linear.linear}
        results[f"chain {rows} rows, us"] = {way: chain(rows, function) for way, function in run.items()}
    return results


def linear_jobs(rows: int, features: int, depth: int) -> Iterable[LinearJob]:
    """What `compare_linears` runs on one shape."""
    job = LinearJob.of(linear.choose_tiles(rows, features), rows, depth, False)
    yield job
    yield from (LinearJob.of(tiles, rows, depth, False) for tiles in wide_candidates(rows))


def microseconds(weights: list[torch.Tensor], rows: int, function: Callable) -> float:
    input = torch.randn(rows, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    return seconds([partial(function, input, weight) for weight in weights]) * 1e6


def chain(rows: int, function: Callable, layers: int = 6) -> float:
    """Microseconds of a layer's four projections, each of the last one's output, or as much of it as it takes."""
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    shapes = [PROJECTIONS[name] for name in LAYER]
    weights = [[make(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(layers)]
    input = make(rows, shapes[0][1])

    def run(layer: list[torch.Tensor]) -> None:
        hidden = input
        for weight in layer:
            hidden = function(hidden[:, : weight.shape[1]], weight)

    return seconds([partial(run, layer) for layer in weights]) * 1e6


def compare_layers() -> dict:
    """Microseconds per layer, with cuBLAS, with our projections, and with attention whose launches overlap, too."""
    run: dict[str, tuple[Callable, bool]] = {
        "cublas": (torch.nn.functional.linear, False),
        "ours": (linear.skinny_linear, False),
        "ours, attention overlapped": (linear.skinny_linear, True),
    }
    return {
        f"layer {rows} x {context}, us": {
            name: layer(rows, context, way, overlap=on) for name, (way, on) in run.items()
        }
        for rows, context in ((1, 128), (1, 8192), (16, 1024), (32, 192))
    }


def measure() -> dict:
    """Our kernels as they are chosen, beside torch's."""
    results: dict = {}
    for sequences, context in DECODE:
        results[f"decode {sequences} x {context}, TB/s"] = {
            "enginery": decode(sequences, context, [None])[None],
            "cudnn (dense)": sdpa_decode(sequences, context, SDPBackend.CUDNN_ATTENTION),
            "flash (dense)": sdpa_decode(sequences, context, SDPBackend.FLASH_ATTENTION),
        }
    for tokens in PREFILL:
        results[f"prefill {tokens}, TFLOP/s"] = {
            "enginery": prefill(tokens, [None])[None],
            "cudnn (dense)": sdpa_prefill(tokens, SDPBackend.CUDNN_ATTENTION),
            "flash (dense)": sdpa_prefill(tokens, SDPBackend.FLASH_ATTENTION),
        }
    for name, (features, depth) in PROJECTIONS.items():
        weights = weights_for(features, depth)
        for rows in ROWS:
            results[f"{name} {rows} rows, TB/s"] = {
                "enginery": project(weights, rows, linear.skinny_linear),
                "cublas": project(weights, rows, torch.nn.functional.linear),
            }
    return results | compare_layers()


def read_bandwidth() -> float:
    """TB/s of a reduction that reads 4 GB: the limit for every rate of this file that is in TB/s."""
    data = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    return data.numel() * 4 / seconds([data.sum] * 2) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time all candidates, too; the six best of each are kept")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile candidates (default: 8)")
    parser.add_argument("--compile", action="store_true", help="only compile the candidates, for a later --tune")
    parser.add_argument("--linear", action="store_true", help="only the projections, in microseconds")
    parser.add_argument("--layer", action="store_true", help="only a layer's heavy kernels together")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    if options.compile:
        compile_all(candidates(), options.workers)
        return
    if options.linear:
        record("gpu_linears", compare_linears(options.workers), write=options.write)
        return
    if options.layer:
        record("gpu_layer", compare_layers(), write=options.write)
        return
    limit = read_bandwidth()
    measured = measure()
    tuned = tune(options.workers) if options.tune else {}
    record("gpu_kernels", {"read, TB/s": limit, **measured, "tuned": tuned}, table=measured, write=options.write)


if __name__ == "__main__":
    main()
