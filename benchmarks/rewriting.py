"""What rewriting costs: microseconds per compute node, growth, cascades, peers side by side.

    python benchmarks/rewriting.py [--layers 100 1000 5000] [--rounds 5] [--peers] [--write]

Medians of process time (other work on the machine disturbs wall time most); systems take turns within each round.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Callable
from time import process_time
from typing import Any

import torch

from enginery.network.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from record import record
from rewriting_graphs import (
    CASCADES,
    MATCHES_PER_LAYER,
    NODES_PER_LAYER,
    RULES,
    AddNorm,
    MergePair,
    cascade,
    idle_rules,
    pairs_of_linears,
    transformer,
)
from rewriting_peers import PEERS


def seconds(make: Callable[[], Any], work: Callable[[Any], Any]) -> float:
    subject = make()
    gc.collect()
    start = process_time()
    work(subject)
    return process_time() - start


def rewriter(*rules: PatternRewriter, count: int | None = None, verify: bool = True) -> Callable[[Network], None]:
    """`verify=False` leaves out the structural check of the whole network that ends every phase."""
    manager = RewritePatternManager(*rules)

    def work(network: Network) -> None:
        if not verify:
            network.verify = lambda: None  # type: ignore[method-assign]
        report = manager.rewrite(network)
        if count is not None and report.rewritten != count:
            raise SystemExit(f"{report.rewritten} rewrites where {count} were expected")

    return work


def rounds(systems: dict[str, tuple[Callable, Callable]], count: int) -> dict[str, float]:
    """Median seconds of each system; all of them run once in each round."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(count):
        for name, (make, work) in systems.items():
            times[name].append(seconds(make, work))
    return {name: statistics.median(values) for name, values in times.items()}


def per_node(layers: list[int], count: int) -> dict[str, dict[str, float]]:
    """µs per compute node of the three rules, with types, provenance, journal and report."""
    table: dict[str, dict[str, float]] = {"three rules": {}, "and the structural check": {}, "100 rules": {}}
    for size in layers:
        wanted = MATCHES_PER_LAYER * size
        systems = {
            "three rules": (lambda: transformer(size), rewriter(*(r() for r in RULES), count=wanted, verify=False)),  # noqa: B023
            "and the structural check": (lambda: transformer(size), rewriter(*(r() for r in RULES), count=wanted)),  # noqa: B023
            "100 rules": (
                lambda: transformer(size),  # noqa: B023
                rewriter(*(r() for r in RULES), *idle_rules(97), count=wanted, verify=False),
            ),
        }
        for name, value in rounds(systems, count if size < 5000 else min(count, 3)).items():
            table[name][str(size)] = round(value / size / NODES_PER_LAYER * 1e6, 2)
    for row in table.values():
        if len(layers) > 1:
            first, last = layers[0], layers[-1]
            row["exponent"] = round(1 + math.log(row[str(last)] / row[str(first)]) / math.log(last / first), 3)
    return table


def single(count: int) -> dict[str, float]:
    """Seconds of one call each."""
    systems: dict[str, tuple[Callable, Callable]] = {
        f"cascade of 1,000: {name}": (lambda name=name: cascade(name, 1000), rewriter(rule(), count=1000, verify=False))
        for name, (rule, _) in CASCADES.items()
    }
    systems["two roots, 1,000 layers"] = (
        lambda: pairs_of_linears(1000),
        rewriter(MergePair(), count=1000, verify=False),
    )
    systems["two outputs, 3,000 layers"] = (lambda: transformer(3000), rewriter(AddNorm(), count=6000, verify=False))
    return {name: round(value, 4) for name, value in rounds(systems, count).items()}


def peers(size: int, count: int) -> dict[str, dict[str, float]]:
    """µs per compute node of torch's own matchers on the same calls, and how many times ours is faster."""
    wanted = MATCHES_PER_LAYER * size
    systems = {"ours": (lambda: transformer(size), rewriter(*(r() for r in RULES), count=wanted, verify=False))}
    systems |= {name: (lambda make=make: make(size), work) for name, (make, work) in PEERS.items()}
    found = rounds(systems, count)
    return {
        name: {
            "µs per node": round(value / size / NODES_PER_LAYER * 1e6, 2),
            "times ours": round(value / found["ours"], 1),
        }
        for name, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=int, nargs="*", default=[], help="layers at which torch's matchers run too")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rewriter(*(r() for r in RULES))(transformer(20))
    results: dict[str, Any] = {"per node": per_node(options.layers, options.rounds), "seconds": single(options.rounds)}
    table: dict[str, dict[str, Any]] = {f"µs per node, {name}": row for name, row in results["per node"].items()}
    table |= {name: {"seconds": value} for name, value in results["seconds"].items()}
    for size in options.peers:
        found = peers(size, 1)
        results[f"peers at {size} layers"] = found
        table |= {f"{name}, {size} layers": row for name, row in found.items()}
    record("rewriting", results, table=table, write=options.write)


if __name__ == "__main__":
    main()
