"""What two runs of the phases did differently: rules and counts by phase, and the networks that came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from enginery.network import Network
from enginery.rewriting.alike import Group, alike
from enginery.rewriting.report import Report, RuleReport

Phases = list[tuple[str, Report]]
Change = tuple[Any, Any]
"""the value in the one and in the other; None: not there"""
COUNTS = ("tried", "matched", "rewritten")


@dataclass(frozen=True)
class Comparison:
    """Of the network and the phases of one configuration with those of another."""

    base: Network
    base_phases: Phases
    other: Network
    other_phases: Phases

    def layers(self) -> dict[str, dict[str, Change]]:
        """By phase: layers before and after it, where they differ."""
        found = {}
        for phase, one, other in self._phases():
            pairs = {name: _pair(one, other, f"layers_{name}") for name in ("before", "after")}
            if any(a != b for a, b in pairs.values()):
                found[phase] = pairs
        return found

    def rules(self) -> dict[str, dict[str, dict[str, Change]]]:
        """By phase and rule: what differs of tried, matched and rewritten, and declines by reason."""
        found: dict[str, dict[str, dict[str, Change]]] = {}
        for phase, one, other in self._phases():
            mine, theirs = (report.rules if report is not None else {} for report in (one, other))
            for label in dict.fromkeys([*mine, *theirs]):
                changes = _changes(mine.get(label), theirs.get(label))
                if changes:
                    found.setdefault(phase, {})[label] = changes
        return found

    @cached_property
    def network(self) -> str:
        """The layers that differ, as `Network.diff` says it; empty if none do."""
        return self.base.diff(self.other)

    def groups(self) -> list[Group]:
        """The lines of `network`, repeated layers once."""
        _, *lines = self.network.splitlines() or [""]
        return alike((_path(line), line) for line in lines)

    def to_json(self) -> dict[str, Any]:
        lines = self.network.splitlines()[1:]
        return {
            "phases": [
                {"phase": phase, "layers": self.layers().get(phase, {}), "rules": self.rules().get(phase, {})}
                for phase, _, _ in self._phases()
            ],
            "network": {
                "removed": [line[2:] for line in lines if line.startswith("-")],
                "added": [line[2:] for line in lines if line.startswith("+")],
            },
        }

    def _phases(self) -> Iterator[tuple[str, Report | None, Report | None]]:
        mine, theirs = dict(self.base_phases), dict(self.other_phases)
        for phase in dict.fromkeys([*mine, *theirs]):
            yield phase, mine.get(phase), theirs.get(phase)


def _pair(one: Any, other: Any, name: str) -> Change:
    return getattr(one, name, None), getattr(other, name, None)


def _changes(one: RuleReport | None, other: RuleReport | None) -> dict[str, Change]:
    changes = {name: _pair(one, other, name) for name in COUNTS}
    mine, theirs = (dict(rule.declined) if rule is not None else None for rule in (one, other))
    return {name: pair for name, pair in {**changes, "declined": (mine, theirs)}.items() if pair[0] != pair[1]}


def _path(line: str) -> str:
    """The name that a line of a diff is about: `- %model.layers.0.mlp.mul: …`, `+ output logits = …`."""
    _, _, name = line.partition("%")
    return name.partition(":")[0].strip('"')


__all__ = ["Comparison"]
