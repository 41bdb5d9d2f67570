"""What a phase did: per rule tried, matched, rewritten, declined, milliseconds; each application."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Application(NamedTuple):
    """One rewrite: the rule, the layers that it replaced (the root first), those that it made, those that went."""

    rule: str
    root: str
    module_path: str
    replaced: tuple[str, ...]
    """what its pattern matched; an inner layer that others read as well is still there"""
    added: tuple[str, ...]
    erased: tuple[str, ...] = ()
    """nobody reads them any more, whether they were matched or only fed what was"""

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    def __str__(self) -> str:
        return f"{' + '.join(self.replaced)}  →  {' + '.join(self.added) or 'an existing value'}"


@dataclass(slots=True)
class RuleReport:
    """How one rule fared in one phase."""

    label: str
    location: str = "?"
    benefit: int = 0
    tried: int = 0
    """layers offered to it"""
    matched: int = 0
    """offers whose pattern (or `match`) and constraints fitted"""
    rewritten: int = 0
    replayed: int = 0
    """how many of those repeated what the rule had said to an equal layer"""
    declined: Counter[str] = field(default_factory=Counter)
    """by reason"""
    milliseconds: float = 0.0
    rolled_back: str = ""
    """why verification took the rule's work back, if it did"""
    expected: int | None = None

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__slots__}
        return {**facts, "declined": dict(self.declined), "milliseconds": round(self.milliseconds, 3)}


@dataclass
class Report:
    """Of one run of a manager over one network."""

    rules: dict[str, RuleReport] = field(default_factory=dict)
    applications: list[Application] = field(default_factory=list)
    layers_before: int = 0
    layers_after: int = 0
    milliseconds: float = 0.0
    verified: bool = False
    """the network was run before and after; rules that changed an output were taken back"""

    def __getitem__(self, label: str) -> RuleReport:
        return self.rules[label]

    def __contains__(self, label: str) -> bool:
        return label in self.rules

    @property
    def rewritten(self) -> int:
        return sum(rule.rewritten for rule in self.rules.values())

    def __str__(self) -> str:
        rows = [("rule", "tried", "matched", "rewritten", "ms", "declined", "where")]
        for rule in self.rules.values():
            declined = "; ".join(f"{reason} ({count})" for reason, count in rule.declined.most_common(3))
            counts = (str(rule.tried), str(rule.matched), str(rule.rewritten), f"{rule.milliseconds:.2f}")
            rows.append((rule.label, *counts, rule.rolled_back or declined, rule.location))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(_cell(row[i], widths[i], i) for i in range(len(row))).rstrip() for row in rows]
        summary = f"{self.layers_before} layers → {self.layers_after}, {self.milliseconds:.2f} ms"
        replayed = sum(rule.replayed for rule in self.rules.values())
        if replayed:
            summary += f", {replayed} of {self.rewritten} repeated"
        if self.verified:
            taken_back = [rule.label for rule in self.rules.values() if rule.rolled_back]
            summary += f", verified{' without ' + ', '.join(taken_back) if taken_back else ''}"
        return "\n".join([*lines, summary])

    def to_json(self) -> dict[str, Any]:
        return {
            "layers_before": self.layers_before,
            "layers_after": self.layers_after,
            "milliseconds": round(self.milliseconds, 3),
            "verified": self.verified,
            "rules": {label: rule.to_json() for label, rule in self.rules.items()},
            "applications": [application.to_json() for application in self.applications],
        }

    def diff(self, other: Report) -> str:
        """What differs in `other`, one line per rule; times are left out. Empty if nothing does."""
        lines = []
        for label in dict.fromkeys([*self.rules, *other.rules]):
            mine, theirs = self.rules.get(label), other.rules.get(label)
            if mine is None or theirs is None:
                lines.append(f"{'-' if theirs is None else '+'} {label}")
                continue
            changes = [
                f"{name} {getattr(mine, name)} → {getattr(theirs, name)}"
                for name in ("tried", "matched", "rewritten")
                if getattr(mine, name) != getattr(theirs, name)
            ]
            if mine.declined != theirs.declined:
                changes.append(f"declined {dict(mine.declined)} → {dict(theirs.declined)}")
            if changes:
                lines.append(f"  {label}: {', '.join(changes)}")
        if self.layers_after != other.layers_after:
            lines.append(f"  layers after: {self.layers_after} → {other.layers_after}")
        return "\n".join(lines)


def _cell(text: str, width: int, column: int) -> str:
    return text.rjust(width) if 1 <= column <= 4 else text.ljust(width)
