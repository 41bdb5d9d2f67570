"""Declared expectations: a fusion that stops firing fails the build, by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from enginery.errors import RewriteError
from enginery.network.network import Network
from enginery.rewriting.binding import BoundRule
from enginery.rewriting.explain import nearest_miss
from enginery.rewriting.report import Report

_REPEATED = re.compile(r"^(.*?)\.?\b(\d+)\b")


def unmet_expectation(
    network: Network, report: Report, rules: Sequence[BoundRule], blocks: frozenset[str]
) -> RewriteError | None:
    """An error for the first rule that did not apply as often as it declares. `blocks`: see `repeated_blocks`."""
    for rule in rules:
        expected = rule.source.expect
        if expected is None:
            continue
        fact = report[rule.label]
        if expected == "each layer":
            reached = {
                block_of(application.module_path)
                for application in report.applications
                if application.rule == rule.label
            }
            missing = sorted(blocks - reached, key=_natural)
            fact.expected = len(blocks)
            if not missing and blocks:
                continue
            said = (
                f"did not apply in {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
                if blocks
                else "found no repeated layers"
            )
        else:
            fact.expected = int(expected)
            if fact.rewritten == fact.expected:
                continue
            said = f"applied {fact.rewritten} times where {expected} were expected"
        miss = nearest_miss(network, rule)
        fix = f"Nearest miss at {miss.layer}: {miss.reason}" if miss is not None else "Change expect= if that is right"
        return RewriteError(f"rule {rule.label} {said}", fix, rule=rule.label, layer=miss.layer if miss else "")
    return None


def repeated_blocks(module_paths: Iterable[str]) -> frozenset[str]:
    """The paths of the repeated module with the most members, such as model.layers.0 … model.layers.31."""
    families: dict[str, set[str]] = defaultdict(set)
    for path in module_paths:
        block = block_of(path)
        if block:
            families[block.rpartition(".")[0]].add(block)
    return frozenset(max(families.values(), key=len, default=()))


def block_of(module_path: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp`; empty if no part of the path is a number."""
    found = _REPEATED.match(module_path)
    return module_path[: found.end()] if found else ""


def _natural(path: str) -> list:
    return [int(part) if part.isdigit() else part for part in path.split(".")]
