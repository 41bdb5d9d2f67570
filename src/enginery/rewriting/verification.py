"""Verified rewriting: the network runs before and after, and rules that changed what it computes are taken back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from enginery.network.network import Network
from enginery.rewriting import numerics
from enginery.rewriting.run import Run

Start = Callable[[Collection[str], int | None], Run]
"""makes a run without the rules of these labels that ends after so many applications (None: all)"""


def run_verified(network: Network, start: Start, given: Sequence[Any] | Mapping[str, Any] | bool) -> Run:
    """Runs the rules; takes back each rule whose application first changed an output, and runs the others again.

    Runs are deterministic, so the application at fault is found by bisection over their number.
    """
    values = numerics.sample_values(network, given)
    expected = numerics.run(network, values)
    banned: dict[str, str] = {}
    while True:
        run = start(frozenset(banned), None)
        report = run.run()
        fault = numerics.difference(expected, numerics.run(network, values), network.output_names)
        if not fault:
            break
        run.undo()
        guilty, fault = _first_fault(network, start, frozenset(banned), len(report.applications), values, expected)
        application = report.applications[guilty]
        banned[application.rule] = f"taken back at {application.root}: {fault}"
    report.verified = True
    for label, reason in banned.items():
        report.rules[label].rolled_back = reason
    return run


def _first_fault(
    network: Network,
    start: Start,
    banned: frozenset[str],
    count: int,
    values: numerics.Values,
    expected: Sequence[torch.Tensor],
) -> tuple[int, str]:
    """Index of the first application after which the outputs differ, and what differs then."""
    low, high, fault = 0, count, ""
    while low < high:
        middle = (low + high) // 2
        run = start(banned, middle + 1)
        run.run()
        found = numerics.difference(expected, numerics.run(network, values), network.output_names)
        run.undo()
        if found:
            high, fault = middle, found
        else:
            low = middle + 1
    return min(low, count - 1), fault or "the outputs differ"
