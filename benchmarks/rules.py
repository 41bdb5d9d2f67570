"""What each rewrite rule gains: a network with the rule and without it, step by step in turn.

    python benchmarks/rules.py --write                        # on a CPU, each rule on a model that it fires on
    python benchmarks/rules.py --device cuda --write          # layers of Llama-3.1-8B in bfloat16, CUDA graphs
    python benchmarks/rules.py --only FuseAddNorm,GatherEarlier --layers 2 --rounds 5
    python benchmarks/rules.py --markdown docs/rules.md       # puts the table of the records into the document

A rule that is on by default is switched off, one that is off is switched on; everything else stays. Both networks are
compiled. Their steps take turns, the order changes from round to round, and a gain is the median over rounds of
(time without / time with − 1); its spread is half the distance between the quartiles. "noise" is a network beside
itself. Decoding: one token for each of B sequences behind 128 cached ones (512 on a GPU); prefill: one prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

from enginery import BuildConfig
from enginery.checkpoint import Checkpoint
from enginery.engine.binding import WeightEvaluator
from enginery.engine.builder import prepare
from enginery.engine.compile import load
from enginery.engine.engine import compile_regions
from enginery.engine.regions import outline
from enginery.engine.steps import CompiledStep
from enginery.errors import UnsupportedError
from enginery.kernels.table import TABLE
from enginery.llm import import_network
from enginery.network import Dim, Network
from enginery.rewriting.pipeline import optional_rules
from record import record
from rule_models import FIRES, ON_GPU, checkpoint, llama_8b
from rule_table import NOISE, TOGETHER, on_by_default, put_table

BLOCK = 16
Step = Callable[[], float]
"""runs one step and gives its seconds"""


@dataclass(frozen=True)
class Batch:
    """`new` tokens for each sequence, behind `context` cached ones."""

    name: str
    sequences: int
    new: int
    context: int

    @property
    def blocks(self) -> int:
        """of one sequence"""
        return -(-(self.context + self.new) // BLOCK)

    def values(self, device: str) -> dict[str, torch.Tensor]:
        """The step's inputs by name."""
        first = torch.arange(self.sequences) * self.blocks
        place = torch.arange(self.context, self.context + self.new)
        slots = (first[:, None] * BLOCK + place).flatten()
        start = torch.arange(self.sequences + 1, dtype=torch.int32) * self.new
        return {
            name: value.to(device)
            for name, value in {
                "token_ids": torch.arange(self.sequences * self.new) % 1000,
                "positions": place.repeat(self.sequences),
                "slot_mapping": slots,
                "block_tables": (first[:, None] + torch.arange(self.blocks)).int(),
                "query_start": start,
                "seq_lens": torch.full((self.sequences,), self.context + self.new, dtype=torch.int32),
                "logits_indices": start[1:].long() - 1,
            }.items()
        }


BATCHES = {
    "cpu": (Batch("decode 1", 1, 1, 128), Batch("decode 8", 8, 1, 128), Batch("prefill 128", 1, 128, 0)),
    "cuda": tuple(Batch(f"decode {count}", count, 1, 512) for count in (1, 32, 256)),
}
LAYERS = {"cpu": 2, "cuda": 4}


class Subject:
    """A model behind all phases, compiled, with its weights and KV pools."""

    def __init__(self, source: Checkpoint, config: BuildConfig) -> None:
        imported = import_network(source, config)
        prepared = prepare(imported, config)
        network = prepared.parts.network
        regions = outline(network)
        self.device = config.resolved_device()
        self.applied = prepared.phases.counts
        self.layers, self.regions = len(network), len(regions.distinct)
        TABLE.load(self.device)
        runs = {key: load(path, self.device) for key, path in compile_regions(regions, self.device).items()}
        evaluator = WeightEvaluator(imported.network, prepared.parts.weights.values(), source.read)
        fixed = {name: evaluator.value(t).to(self.device) for name, t in prepared.parts.weights.items()}
        fixed |= _pools(network, self.device)
        self._step = CompiledStep(regions, runs, fixed, [t for t in network.inputs if t.name not in fixed])

    def step(self, batch: Batch) -> Step:
        values = batch.values(self.device)
        if self.device == "cuda":
            return _graph(lambda: self._step(values))

        def timed() -> float:
            begin = time.perf_counter()
            self._step(values)
            return time.perf_counter() - begin

        return timed


def _pools(network: Network, device: str) -> dict[str, torch.Tensor]:
    count = max(batch.sequences * batch.blocks for batch in BATCHES[device])
    pools = [tensor for tensor in network.inputs if "_cache." in tensor.name]
    return {
        pool.name: torch.zeros(
            [count if isinstance(n, Dim) else n for n in pool.shape], dtype=pool.dtype, device=device
        )
        for pool in pools
    }


def _graph(step: Callable[[], object]) -> Step:
    """A step that is captured once and replayed."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def timed() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return timed


def compare(without: Step, with_it: Step, rounds: int) -> dict[str, float]:
    """µs of both steps, and the gain of the second in per cent."""
    pairs = []
    for number in range(rounds + 2):
        first, second = (without, with_it) if number % 2 else (with_it, without)
        times = first(), second()
        pairs.append(times if number % 2 else times[::-1])
    gains = [100 * (before / after - 1) for before, after in pairs[2:]]
    low, middle, high = statistics.quantiles(gains, n=4)
    before, after = (statistics.median(column) * 1e6 for column in zip(*pairs[2:], strict=True))
    return {"without, µs": before, "with, µs": after, "gain, %": middle, "spread, %": (high - low) / 2}


def arms(device: str, only: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Models, and the rules that are measured on each."""
    groups = {"llama-8b": (NOISE, *ON_GPU)} if device == "cuda" else {**FIRES, "llama": (NOISE, *FIRES["llama"])}
    for model, names in groups.items():
        wanted = [name for name in names if not only or name in only]
        if wanted:
            yield model, wanted


def measure(model: str, names: list[str], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    device, known, on = options.device, optional_rules(), on_by_default(options.device)
    source = llama_8b(options.layers, device) if device == "cuda" else checkpoint(model, options.layers)
    base = BuildConfig(device=device)
    plain = Subject(source, base)
    for name in names:
        rules = [] if name == NOISE else name.split(TOGETHER)
        given = tuple(known[rule]() for rule in rules if rule not in on)
        disabled = tuple(rule for rule in rules if rule in on)
        try:
            with_it = Subject(source, replace(base, rules=given)) if given else plain
            without = plain if given and not disabled else Subject(source, replace(base, disabled_rules=disabled))
        except UnsupportedError as error:
            yield name, {"model": model, "needed": str(error)}
            continue
        row: dict[str, Any] = {
            "model": model,
            "applied": sum(with_it.applied.get(rule, 0) for rule in rules),
            "layers": f"{without.layers} → {with_it.layers}",
            "regions": f"{without.regions} → {with_it.regions}",
        }
        for batch in BATCHES[device]:
            row[batch.name] = compare(without.step(batch), with_it.step(batch), options.rounds)
        yield name, row


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the printed table."""
    cells = {name: value for name, value in row.items() if not isinstance(value, dict)}
    gains = {name: f"{v['gain, %']:+.1f} ± {v['spread, %']:.1f} %" for name, v in row.items() if isinstance(v, dict)}
    return cells | gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="rules, comma-separated, as the table names them")
    parser.add_argument("--layers", type=int, help=f"of the models; default: {LAYERS}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="put the table of all records into FILE and stop")
    options = parser.parse_args()
    if options.markdown is not None:
        put_table(options.markdown)
        return
    options.layers = options.layers or LAYERS[options.device]
    if options.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    results: dict[str, Any] = {}
    for model, names in arms(options.device, only):
        for name, row in measure(model, names, options):
            results[name] = row
            print(json.dumps({name: shown(row)}, ensure_ascii=False), flush=True)
    table = {name: {k: v for k, v in shown(row).items() if k != "applied"} for name, row in results.items()}
    record(f"rules_{options.device}", {"layers": options.layers, "rules": results}, table=table, write=options.write)


if __name__ == "__main__":
    main()
