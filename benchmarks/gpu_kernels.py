"""How near does attention on a GPU come to the memory's and the matrix units' rate, and to cuDNN?

    python benchmarks/gpu_kernels.py [--layer] [--tune] [--decode | --prefill] [--write]

The shapes are those of Llama-3.1-8B (32 query heads, 8 KV heads of 128) in bfloat16; block tables are as wide as the
engine pads them. A time is the median over replays of a CUDA graph that holds several calls on different data, so that
nothing is left in the L2 cache from one call to the next. All is timed with the kernel that is chosen ("enginery") and
with the general one ("attend_short", "attend_long"), which but on Hopper is the same. Decoding is timed on contexts of
one length, and on *ragged* ones, log-normal, as a server has them: in microseconds, as planned, with no context cut
("one split", in the kernel that is chosen), and what reading keys and values takes by the rate of a reduction
("least").

`--tune` also times the candidates, with rotary embedding as in a model: tiles of the general kernels, and of ragged
contexts the splits of both kernels, where "attend_few" stands for the tiles of the one for Hopper. `--decode` and
`--prefill` time nothing but those of one kind. `--layer` times a layer's attention and projections together; the
projections alone: `gpu_linears.py`.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from enginery.engine.buckets import CONTEXTS, CONTEXTS_OF_FEW, FEW_SEQUENCES
from enginery.kernels.triton import linear, paged_attention
from enginery.kernels.triton.attention_plan import LaunchPlan, Tiling, plan_launch
from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.paged_attention import new_arrivals
from gpu_linears import LAYER, PROJECTIONS
from gpu_timing import L2_BYTES, compile_all, read_bandwidth, seconds
from record import record

DEVICE = torch.device("cuda")
HEADS, KV_HEADS, HEAD, BLOCK = 32, 8, 128, 16
SCALE = HEAD**-0.5
DECODE = ((1, 192), (1, 8192), (16, 8192), (32, 192), (128, 256), (256, 192))
"""Sequences, and the keys of each."""
RAGGED = (8, 26, 46, 91, 150, 248)
"""Sequences, of `ragged` lengths."""
PREFILL = ((1024, 0), (8192, 0), (2048, 6144))
"""New tokens of a prompt, and its context."""

Times = dict[LaunchPlan | None, float]
"""Seconds of a call by its plan; None: as it is chosen."""


def ragged(sequences: int) -> list[int]:
    """Keys of each sequence: log-normal, the same in every run."""
    draw = random.Random(sequences)
    return [min(2200, max(20, int(draw.lognormvariate(5.55, 0.75)))) for _ in range(sequences)]


def columns_for(lengths: Sequence[int]) -> int:
    """Of the block tables of a step of so many keys, as the engine pads them."""
    sizes = CONTEXTS_OF_FEW if len(lengths) <= FEW_SEQUENCES else CONTEXTS
    return next(size for size in sizes if size * BLOCK >= max(lengths))


def layers_for(keys: int) -> int:
    """Pools enough that one call's cannot stay in the L2 until its next turn; at least eight calls a graph."""
    return max(8, -(-4 * L2_BYTES // bytes_of(keys)))


def bytes_of(keys: int) -> int:
    """Of keys and values in a layer."""
    return keys * KV_HEADS * HEAD * 2 * 2


def operations(tokens: int, context: int) -> float:
    """Of causal attention of one sequence."""
    return 4 * HEADS * HEAD * tokens * (context + (tokens + 1) / 2)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


@dataclass
class Batch:
    """A call's tensors, and several layers' pools."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pools: list[tuple[torch.Tensor, torch.Tensor]]
    metadata: tuple[torch.Tensor, ...]
    angles: tuple[torch.Tensor, torch.Tensor]
    arrivals: torch.Tensor

    @classmethod
    def random(cls, lengths: Sequence[int], new: int, layers: int) -> Batch:
        """Sequences of so many keys, the last `new` of each of them new; their blocks are scattered."""
        tokens, blocks = len(lengths) * new, [-(-length // BLOCK) for length in lengths]
        tables = pad_sequence(torch.randperm(sum(blocks)).int().split(blocks), batch_first=True)
        tables = pad(tables, (0, columns_for(lengths) - tables.shape[1]))
        places = torch.tensor(lengths)[:, None] - new + torch.arange(new)
        slots = (tables.gather(1, places // BLOCK).long() * BLOCK + places % BLOCK).flatten()
        start = torch.arange(0, tokens + 1, new).int()
        metadata = tuple(each.to(DEVICE) for each in (slots, tables, start, torch.tensor(lengths).int()))
        heads = [randn(tokens, count, HEAD) for count in (HEADS, KV_HEADS, KV_HEADS)]
        shape = (sum(blocks), KV_HEADS, BLOCK, HEAD)
        pools = [(randn(*shape), randn(*shape)) for _ in range(layers)]
        return cls(*heads, pools, metadata, (randn(tokens, HEAD), randn(tokens, HEAD)), new_arrivals(DEVICE))

    def calls(self, plan: LaunchPlan | None = None, *, rotary: bool = False) -> list[Callable]:
        attend = partial(
            paged_attention.paged_attention, plan=plan, arrivals=self.arrivals, angles=self.angles if rotary else None
        )
        heads = (self.query, self.key, self.value)
        return [partial(attend, *heads, *pool, *self.metadata, SCALE) for pool in self.pools]

    def times(self, plans: Iterable[LaunchPlan | None], *, rotary: bool = False) -> Times:
        return {plan: seconds(self.calls(plan, rotary=rotary)) for plan in plans}


def default_plan(lengths: Sequence[int], new: int = 1) -> LaunchPlan:
    gpu, capacity = Gpu.of(DEVICE), columns_for(lengths) * BLOCK
    return plan_launch(gpu, len(lengths) * new, len(lengths), capacity, KV_HEADS, HEADS // KV_HEADS, HEAD, 2)


def general(plan: LaunchPlan) -> LaunchPlan:
    """By the kernels for any GPU."""
    return replace(plan, hopper_programs=0)


def decode(lengths: Sequence[int], plans: Iterable[LaunchPlan | None], *, rotary: bool = False) -> Times:
    """`lengths` count the new token of each sequence."""
    return Batch.random(lengths, 1, layers_for(sum(lengths))).times(plans, rotary=rotary)


def prefill(tokens: int, context: int, plans: Iterable[LaunchPlan | None], *, rotary: bool = False) -> Times:
    """Causal attention of one sequence, the writing of the cache included."""
    return Batch.random([context + tokens], tokens, 4).times(plans, rotary=rotary)


def sdpa_decode(sequences: int, context: int, backend: SDPBackend) -> float:
    """Seconds of torch's attention over dense keys and values."""
    query, shape = randn(sequences, HEADS, 1, HEAD), (sequences, KV_HEADS, context, HEAD)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    with sdpa_kernel(backend):
        layers = layers_for(sequences * context)
        return seconds([partial(attend, query, randn(*shape), randn(*shape)) for _ in range(layers)])


def sdpa_prefill(tokens: int, backend: SDPBackend) -> float:
    query, key, value = (randn(1, count, tokens, HEAD) for count in (HEADS, KV_HEADS, KV_HEADS))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    with sdpa_kernel(backend):
        return seconds([partial(attend, query, key, value)] * 4)


DECODE_SPLITS = {
    (1, 192): (1, 2, 4, 8), (1, 8192): (16, 32, 64), (16, 8192): (2, 4), (32, 192): (1, 2, 4), (128, 256): (1, 2),
    (256, 192): (1,),
}  # fmt: skip


def decode_candidates(splits: Iterable[int]) -> list[LaunchPlan]:
    shapes = [
        (16, 1, 4), (16, 1, 5), (16, 1, 8), (16, 2, 5), (32, 2, 5), (32, 4, 5), (64, 4, 3), (64, 4, 5),
    ]  # fmt: skip
    base = replace(general(default_plan([8192])), share=1)
    return [replace(base, short=Tiling(16, *shape), splits=count) for shape, count in itertools.product(shapes, splits)]


def ragged_candidates(lengths: Sequence[int]) -> list[LaunchPlan]:
    """Numbers of splits, and what each gets at least, in the kernel that is chosen and in the general one's tiles."""
    base = default_plan(lengths)
    pairs = [(1, 1), *itertools.product((2, 4, 8, 16), (1, 8, 16, 32))]
    candidates = [replace(base, splits=splits, share=share) for splits, share in pairs]
    return list(dict.fromkeys([*candidates, *map(general, candidates)]))


def prefill_candidates() -> list[LaunchPlan]:
    shapes = [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    ]  # fmt: skip
    base = default_plan([1024], 1024)
    ways = itertools.product(shapes, (False, True))
    candidates = [replace(general(base), long=Tiling(*shape, descriptors)) for shape, descriptors in ways]
    return [base, *candidates] if base.hopper_programs else candidates


def compile_one(plan: LaunchPlan) -> None:
    batch = Batch.random([64], 1, 1) if plan.decode else Batch.random([32], 32, 1)
    batch.calls(plan, rotary=True)[0]()


def tune(workers: int, kinds: Sequence[str]) -> dict:
    """Microseconds of the six fastest of each; `kinds` of "decode" and "prefill"."""
    cases: dict[str, tuple[Callable, list[LaunchPlan]]] = {}
    if "decode" in kinds:
        for (sequences, context), splits in DECODE_SPLITS.items():
            cases[f"decode {sequences} x {context}"] = partial(decode, [context] * sequences), decode_candidates(splits)
        for sequences in RAGGED:
            lengths = ragged(sequences)
            cases[f"decode {sequences} x {spread(lengths)}"] = partial(decode, lengths), ragged_candidates(lengths)
    if "prefill" in kinds:
        cases |= {f"prefill {prompt(*each)}": (partial(prefill, *each), prefill_candidates()) for each in PREFILL}
    good = compile_all(compile_one, itertools.chain.from_iterable(plans for _, plans in cases.values()), workers)
    results = {}
    for name, (run, plans) in cases.items():
        times = run([plan for plan in plans if plan in good], rotary=True)
        results[name] = {shown(plan): round(times[plan] * 1e6, 2) for plan in sorted(times, key=times.__getitem__)[:6]}
    return results


def spread(lengths: Sequence[int]) -> str:
    return f"{sum(lengths) // len(lengths)} on average, {max(lengths)} at most"


def prompt(tokens: int, context: int) -> str:
    return f"{tokens} after {context}" if context else str(tokens)


def shown(plan: LaunchPlan) -> str:
    if plan.decode:
        kernel = plan.launches[0] if plan.hopper_programs else plan.short
        return f"{kernel}, {plan.splits} splits of {plan.share} blocks"
    return plan.launches[-1] if plan.hopper_programs else str(plan.long)


def layer(rows: int, context: int, function: Callable, *, overlap: bool, layers: int = 6) -> float:
    """Microseconds of a layer's heavy kernels, one after another with small element-wise ones between, as in a model.

    `function(input, weight)` does the projections; `overlap` is for attention.
    """
    lengths = [context] * rows
    batch = Batch.random(lengths, 1, layers)
    # By the general kernel: that for Hopper overlaps in any case.
    attention = batch.calls(replace(default_plan(lengths), overlap=overlap, hopper_programs=0))
    weights = [[randn(*PROJECTIONS[name]) / 100 for name in LAYER] for _ in range(layers)]
    hidden, gated = randn(rows, 4096), randn(rows, 14336)

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


def measure(limit: float) -> dict:
    """Our kernels as they are chosen, beside torch's, and beside the `limit` in TB/s of what reads."""
    results: dict = {}
    for sequences, context in DECODE:
        lengths = [context] * sequences
        any_gpu = general(default_plan(lengths))
        by_plan = decode(lengths, [None, any_gpu])
        times = {
            "enginery": by_plan[None],
            "attend_short": by_plan[any_gpu],
            "cudnn (dense)": sdpa_decode(sequences, context, SDPBackend.CUDNN_ATTENTION),
            "flash (dense)": sdpa_decode(sequences, context, SDPBackend.FLASH_ATTENTION),
        }
        results[f"decode {sequences} x {context}, TB/s"] = rates(bytes_of(sequences * context), times)
    for sequences in RAGGED:
        lengths = ragged(sequences)
        plan = default_plan(lengths)
        whole, any_gpu = replace(plan, splits=1), general(plan)
        by_plan = decode(lengths, [None, whole, any_gpu])
        results[f"decode {sequences} x {spread(lengths)}, us"] = {
            "enginery": by_plan[None] * 1e6,
            "attend_short": by_plan[any_gpu] * 1e6,
            "one split": by_plan[whole] * 1e6,
            "least": bytes_of(sum(lengths)) / limit * 1e-6,
        }
    for tokens, context in PREFILL:
        any_gpu = general(default_plan([context + tokens], tokens))
        by_plan = prefill(tokens, context, [None, any_gpu])
        times = {"enginery": by_plan[None], "attend_long": by_plan[any_gpu]}
        if not context:  # torch's has no paged one
            times["cudnn (dense)"] = sdpa_prefill(tokens, SDPBackend.CUDNN_ATTENTION)
            times["flash (dense)"] = sdpa_prefill(tokens, SDPBackend.FLASH_ATTENTION)
        results[f"prefill {prompt(tokens, context)}, TFLOP/s"] = rates(operations(tokens, context), times)
    return results | compare_layers()


def rates(work: float, times: dict[str, float]) -> dict[str, float]:
    """Tera-units a second."""
    return {name: work / time / 1e12 for name, time in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tune", action="store_true", help="time all candidates, too, and keep the six fastest of each"
    )
    parser.add_argument("--decode", action="store_true", help="only tune the tiles of decoding")
    parser.add_argument("--prefill", action="store_true", help="only tune the tiles of prompts")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile candidates (default: 8)")
    parser.add_argument("--layer", action="store_true", help="only a layer's heavy kernels together")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    only = [kind for kind in ("decode", "prefill") if getattr(options, kind)]
    if only:
        for name, best in tune(options.workers, only).items():
            print(f"{name}, us", *(f"{time}: {plan}" for plan, time in best.items()), sep="\n  ")
        return
    if options.layer:
        record("gpu_layer", compare_layers(), write=options.write)
        return
    limit = read_bandwidth()
    measured = measure(limit)
    tuned = tune(options.workers, ("decode", "prefill")) if options.tune else {}
    record("gpu_kernels", {"read, TB/s": limit, **measured, "tuned": tuned}, table=measured, write=options.write)


if __name__ == "__main__":
    main()
