"""How near does attention on a GPU come to the memory's and the matrix units' rate, and to cuDNN?

    python benchmarks/gpu_kernels.py [--layer] [--tune] [--decode | --prefill] [--write]

The shapes are those of Llama-3.1-8B (32 query heads, 8 KV heads of 128) in bfloat16. A time is the median over replays
of a CUDA graph that holds several calls on different data, so that nothing is left in the L2 cache from one call to
the next. `--tune` also times the candidates of all tile choices, with rotary embedding as in a model; `--decode` and
`--prefill` time nothing but those of one kind. `--layer` times a layer's attention and projections together; the
projections alone: `gpu_linears.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from enginery.kernels.triton import linear, paged_attention
from enginery.kernels.triton.paged_attention import LaunchPlan, Tiling, new_arrivals, plan_launch
from gpu_linears import LAYER, PROJECTIONS
from gpu_timing import L2_BYTES, compile_all, read_bandwidth, seconds
from record import record

HEADS, KV_HEADS, HEAD, BLOCK = 32, 8, 128, 16
SCALE = HEAD**-0.5
DECODE = ((1, 192), (1, 8192), (16, 8192), (32, 192), (128, 256), (256, 192))
PREFILL = (1024, 8192)


@dataclass
class Batch:
    """A call's tensors: sequences with `new` tokens each after `context` cached ones, and several layers' pools."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pools: list[tuple[torch.Tensor, torch.Tensor]]
    metadata: tuple[torch.Tensor, ...]
    angles: tuple[torch.Tensor, torch.Tensor]
    arrivals: torch.Tensor

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
        pools = [(make(shape), make(shape)) for _ in range(layers)]
        arrivals = new_arrivals(torch.device("cuda"))
        return cls(*heads, pools, (slots, tables, start, lengths), (make(tokens, HEAD), make(tokens, HEAD)), arrivals)

    def calls(self, plan: LaunchPlan | None = None, *, rotary: bool = False) -> list[Callable]:
        attend = partial(
            paged_attention.paged_attention, plan=plan, arrivals=self.arrivals, angles=self.angles if rotary else None
        )
        heads = (self.query, self.key, self.value)
        return [partial(attend, *heads, *pool, *self.metadata, SCALE) for pool in self.pools]


def layers_for(sequences: int, context: int) -> int:
    """Pools enough that one call's cannot stay in the L2 until its next turn; at least eight calls a graph."""
    return max(8, -(-4 * L2_BYTES // (sequences * context * KV_HEADS * HEAD * 4)))


def default_plan(sequences: int, new: int, context: int) -> LaunchPlan:
    gpu = paged_attention.Gpu.of(torch.device("cuda", 0))
    return plan_launch(gpu, sequences * new, sequences, context, KV_HEADS, HEADS // KV_HEADS, HEAD, 2)


def decode(
    sequences: int, context: int, plans: Iterable[LaunchPlan | None], *, rotary: bool = False
) -> dict[LaunchPlan | None, float]:
    """TB/s of keys and values read, `context` counting the new token."""
    batch = Batch.random(sequences, 1, context - 1, layers_for(sequences, context))
    volume = sequences * context * KV_HEADS * HEAD * 2 * 2
    return {plan: volume / seconds(batch.calls(plan, rotary=rotary)) / 1e12 for plan in plans}


def prefill(tokens: int, plans: Iterable[LaunchPlan | None], *, rotary: bool = False) -> dict[LaunchPlan | None, float]:
    """TFLOP/s of causal attention over one fresh sequence, the writing of the cache included."""
    batch = Batch.random(1, tokens, 0, 4)
    work = 4 * HEADS * HEAD * tokens * (tokens + 1) / 2
    return {plan: work / seconds(batch.calls(plan, rotary=rotary)) / 1e12 for plan in plans}


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


DECODE_SPLITS = {
    (1, 192): (1, 2, 4, 8), (1, 8192): (16, 32, 64), (16, 8192): (2, 4), (32, 192): (1, 2, 4), (128, 256): (1, 2),
    (256, 192): (1,),
}  # fmt: skip


def decode_candidates(splits: Iterable[int]) -> list[LaunchPlan]:
    shapes = [
        (16, 1, 4), (16, 1, 5), (16, 1, 8), (16, 2, 5), (32, 2, 5), (32, 4, 5), (64, 4, 3), (64, 4, 5),
    ]  # fmt: skip
    base = replace(default_plan(1, 1, 8192), share=1)
    return [replace(base, short=Tiling(16, *shape), splits=count) for shape, count in itertools.product(shapes, splits)]


def prefill_candidates() -> list[LaunchPlan]:
    shapes = [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    ]  # fmt: skip
    base = default_plan(1, 1024, 1024)
    ways = itertools.product(shapes, (False, True))
    return [replace(base, long=Tiling(*shape, descriptors)) for shape, descriptors in ways]


def compile_one(plan: LaunchPlan) -> None:
    batch = Batch.random(1, 1, 63, 1) if plan.decode else Batch.random(1, 32, 0, 1)
    batch.calls(plan, rotary=True)[0]()


def tune(workers: int, kinds: Sequence[str]) -> dict:
    """The six best of each, with their rates; `kinds` of "decode" and "prefill"."""
    plans: dict = {}
    if "decode" in kinds:
        plans |= {partial(decode, *shape): decode_candidates(splits) for shape, splits in DECODE_SPLITS.items()}
    if "prefill" in kinds:
        plans |= {partial(prefill, tokens): prefill_candidates() for tokens in PREFILL}
    good = compile_all(compile_one, itertools.chain(*plans.values()), workers)
    results = {}
    for run, candidates in plans.items():
        rates = run([plan for plan in candidates if plan in good], rotary=True)
        results[" ".join(map(str, (run.func.__name__, *run.args)))] = ranked(
            {(p.short, p.splits) if p.decode else p.long: rate for p, rate in rates.items()}, 6
        )
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
    return results | compare_layers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time all candidates, too; the six best of each are kept")
    parser.add_argument("--decode", action="store_true", help="only tune the tiles of decoding")
    parser.add_argument("--prefill", action="store_true", help="only tune the tiles of prompts")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile candidates (default: 8)")
    parser.add_argument("--layer", action="store_true", help="only a layer's heavy kernels together")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    only = [kind for kind in ("decode", "prefill") if getattr(options, kind)]
    if only:
        for name, best in tune(options.workers, only).items():
            print(name, *best, sep="\n  ")
        return
    if options.layer:
        record("gpu_layer", compare_layers(), write=options.write)
        return
    limit = read_bandwidth()
    measured = measure()
    tuned = tune(options.workers, ("decode", "prefill")) if options.tune else {}
    record("gpu_kernels", {"read, TB/s": limit, **measured, "tuned": tuned}, table=measured, write=options.write)


if __name__ == "__main__":
    main()
