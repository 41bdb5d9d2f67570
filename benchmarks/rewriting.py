"""What rewriting costs: microseconds per compute node beside peers, growth, cascades, the phases of a real decoder.

    make peers                                      # once: packages of the peers, into .peers
    python benchmarks/rewriting.py [--layers 100 1000 5000] [--rounds 5] [--full] [--no-peers] [--write]

Medians of process time (other work on the machine disturbs wall time most). All systems take turns within each round;
one that needs more than five seconds has a single turn. A peer counts only if it made every rewrite. Networks that
would take a peer minutes are left to `--full`.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
import transformers

from enginery.checkpoint import Checkpoint
from enginery.frontends.huggingface import import_checkpoint
from enginery.network.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.pipeline import run_phases
from record import print_table, record
from rewriting_graphs import (
    CASCADES,
    MATCHES_PER_LAYER,
    MISSES,
    NODES_PER_LAYER,
    RULES,
    AddNorm,
    MergePair,
    cascade,
    idle_rules,
    pairs_of_linears,
    transformer,
)

sys.path.append(str(Path(__file__).parent.parent / ".peers"))  # last: nothing of the product's environment is shadowed
import peers

OURS, CHECKED, HUNDRED = "ours", "ours and the structural check", "ours with 100 rules"
SLOW = 5.0
"""seconds; a system that takes longer has one turn"""
ROUNDS_OF_LARGE = 3

Table = dict[str, dict[str, float]]


class System(NamedTuple):
    make: Callable[[], Any]
    work: Callable[[Any], None]
    check: Callable[[Any], None] = lambda subject: None


class Aim(NamedTuple):
    what: str
    unit: str
    limit: float
    at_least: bool
    value: Callable[[Mapping[str, Any]], float]


def seconds(system: System) -> float:
    subject = system.make()
    gc.collect()
    start = process_time()
    system.work(subject)
    used = process_time() - start
    system.check(subject)
    return used


def medians(systems: Mapping[str, System], rounds: int) -> dict[str, float]:
    """Median seconds of each system; all of them run once in each round."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            if not times[name] or times[name][0] < SLOW:
                times[name].append(seconds(system))
    return {name: statistics.median(values) for name, values in times.items()}


def rewriter(*rules: PatternRewriter, count: int | None = None, verify: bool = False) -> Callable[[Network], None]:
    """`verify` keeps the structural check of the whole network that ends every phase."""
    manager = RewritePatternManager(*rules)

    def work(network: Network) -> None:
        if not verify:
            network.verify = lambda: None  # type: ignore[method-assign]
        report = manager.rewrite(network)
        if count is not None and report.rewritten != count:
            raise SystemExit(f"{report.rewritten} rewrites where {count} were expected")

    return work


def ours(layers: int) -> dict[str, System]:
    """The three rules, with types, provenance, journal and report."""
    three, count = [rule() for rule in RULES], MATCHES_PER_LAYER * layers
    workers = {
        OURS: rewriter(*three, count=count),
        CHECKED: rewriter(*three, count=count, verify=True),
        HUNDRED: rewriter(*three, *idle_rules(97), count=count),
    }
    return {name: System(lambda: transformer(layers), work) for name, work in workers.items()}


def other(peer: peers.Peer, layers: int) -> System:
    def check(subject: Any) -> None:
        found = peer.fused(subject)
        if found != peers.wanted(layers):
            raise SystemExit(f"{peer.name} made {found} where {peers.wanted(layers)} were expected")

    return System(lambda: peer.prepare(layers), peer.run, check)


def per_node(others: list[peers.Peer], sizes: list[int], rounds: int, full: bool) -> Table:
    """µs per compute node at each number of layers, and the exponent of growth between the least and the most."""
    table: Table = {}
    for size in sizes:
        systems = ours(size) | {peer.name: other(peer, size) for peer in others if full or size <= peer.most_layers}
        for name, value in medians(systems, rounds if size < 5000 else min(rounds, ROUNDS_OF_LARGE)).items():
            table.setdefault(name, {})[str(size)] = value / size / NODES_PER_LAYER * 1e6
    for row in table.values():
        if len(row) > 1:
            (first, low), *_, (last, high) = row.items()
            row["exponent"] = 1 + math.log(high / low) / math.log(int(last) / int(first))
    return table


def times_ours(table: Table) -> Table:
    """How many times longer each system takes, size by size."""
    return {
        name: {size: value / table[OURS][size] for size, value in row.items() if size != "exponent"}
        for name, row in table.items()
        if name != OURS
    }


MATCHING, EXPLAINING = (
    "three rules that miss, 1,000 layers: matching",
    "three rules that miss, 1,000 layers: explaining",
)


def one_call_each(rounds: int) -> dict[str, float]:
    """Seconds."""
    systems = {
        f"cascade of 1,000: {name}": System(lambda name=name: cascade(name, 1000), rewriter(rule(), count=1000))
        for name, (rule, _) in CASCADES.items()
    }
    systems["two roots, 1,000 layers"] = System(lambda: pairs_of_linears(1000), rewriter(MergePair(), count=1000))
    systems["two outputs, 3,000 layers"] = System(lambda: transformer(3000), rewriter(AddNorm(), count=6000))
    misses = [rule() for rule in MISSES]
    systems[MATCHING] = System(lambda: transformer(1000), rewriter(*misses, count=0))
    systems[EXPLAINING] = System(lambda: transformer(1000), RewritePatternManager(*misses).explain)
    return medians(systems, rounds)


def decoder(layers: int = 32) -> Network:
    """A Llama of transformers as it comes from the frontend: its depth is real, its widths do not matter here."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        return import_checkpoint(Checkpoint.open(Path(directory))).network


def phases(rounds: int) -> dict[str, Any]:
    """All phases of the pipeline over one decoder: seconds of the whole call, milliseconds of each phase."""
    network, reports, sizes = decoder(), [], []

    def work(subject: Network) -> None:
        reports.append(run_phases(subject))
        sizes.append(len(subject))

    total = medians({"all": System(network.copy, work)}, rounds)["all"]
    names = [name for name, _ in reports[0].phases]
    each = {name: statistics.median(report[name].milliseconds for report in reports) for name in names}
    return {"layers before": len(network), "layers after": sizes[0], "seconds": total, "milliseconds": each}


CASCADE = "cascade of 1,000: "
AIMS = (
    Aim("per node, 1,000 layers", "µs", 12, False, lambda r: r["µs per node"][OURS]["1000"]),
    Aim("growth exponent", "", 1.05, False, lambda r: r["µs per node"][OURS]["exponent"]),
    Aim("fx.replace_pattern / ours, 1,000 layers", "×", 100, True,
        lambda r: r["times ours"]["fx.replace_pattern"]["1000"]),
    Aim("register_replacement / ours, 100 layers", "×", 400, True,
        lambda r: r["times ours"]["Inductor register_replacement"]["100"]),
    Aim("100 rules / 3 rules", "×", 2, False, lambda r: r["times ours"][HUNDRED]["1000"]),
    *(Aim(CASCADE + name, "s", 0.1, False, lambda r, name=name: r["seconds"][CASCADE + name]) for name in CASCADES),
    Aim("two roots, 1,000 layers", "s", 0.3, False, lambda r: r["seconds"]["two roots, 1,000 layers"]),
    Aim("two outputs, 3,000 layers", "s", 0.5, False, lambda r: r["seconds"]["two outputs, 3,000 layers"]),
    Aim("explaining misses / matching", "×", 2, False, lambda r: r["seconds"][EXPLAINING] / r["seconds"][MATCHING]),
    Aim("all phases of a 32-layer decoder", "s", 0.5, False, lambda r: r["decoder"]["seconds"]),
)  # fmt: skip


def judged(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each aim with what was measured; those whose figures this run does not have are left out."""
    table: dict[str, dict[str, Any]] = {}
    for aim in AIMS:
        try:
            value = aim.value(results)
        except KeyError:
            continue
        met = value >= aim.limit if aim.at_least else value <= aim.limit
        sign = "≥" if aim.at_least else "≤"
        table[aim.what] = {"measured": value, "aim": f"{sign} {aim.limit} {aim.unit}".rstrip(), "met": met}
    return table


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(results: Mapping[str, Any]) -> None:
    print_table("µs per compute node, by layers", results["µs per node"])
    print_table("times ours", results["times ours"])
    facts = results["decoder"]
    title = f"phases of a decoder, {facts['layers before']} -> {facts['layers after']} layers"
    print_table(title, {name: {"ms": value} for name, value in facts["milliseconds"].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="every peer at every size: hours")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others, missing = ([], {}) if options.no_peers else peers.load()
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    for system in (*ours(20).values(), *(other(peer, 20) for peer in others)):
        seconds(system)  # patterns are compiled, caches are filled
    results: dict[str, Any] = {"µs per node": per_node(others, sorted(options.layers), options.rounds, options.full)}
    results["times ours"] = times_ours(results["µs per node"])
    results |= {"seconds": one_call_each(options.rounds), "decoder": phases(options.rounds), "left out": missing}
    results["aims"] = judged(results)
    results = rounded(results)
    show(results)
    packages = sorted({peer.package for peer in others})
    record("rewriting", results, table=results["aims"], write=options.write, packages=packages)


if __name__ == "__main__":
    main()
