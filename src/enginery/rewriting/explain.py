"""Why a rule did not match: the nearest miss, in words.

`Matcher` answers yes or no, as fast as it can. Here the same patterns are walked step by step, every way is tried, and
what ended each of them is remembered with how far it had come. To find *which* layer came nearest costs one run of the
matcher per candidate: its registers show how many parts had matched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.operator import operator_name, signature
from enginery.network.tensor import Tensor
from enginery.rewriting.binding import BoundRule, Way, bind
from enginery.rewriting.matcher import Registers
from enginery.rewriting.pattern import (
    AnyOp,
    Anything,
    Call,
    Chain,
    Items,
    Literal,
    OneOf,
    Optional,
    Output,
    Pattern,
    Scalar,
    Through,
    Var,
    Vars,
)
from enginery.rewriting.rule import MatchFailure, PatternRewriter


@dataclass(frozen=True)
class Miss:
    """Where the deepest partial match of a rule ended. `matched` parts of the pattern had fitted before."""

    rule: str
    layer: str
    """name of the root at which it was tried; empty if there was none"""
    matched: int
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: nearest miss at {self.layer}: {self.reason}" if self.layer else f"{self.rule}: {self.reason}"


def explain(network: Network, rule: PatternRewriter, *, label: str | None = None) -> Miss | None:
    """The nearest miss of a rule, or None if its pattern and its `check` accept some layer. Nothing is changed."""
    bound = bind(label or type(rule).__name__, rule)
    return nearest_miss(network, bound)


def nearest_miss(network: Network, bound: BoundRule) -> Miss | None:
    best: tuple[int, Layer, Way, Registers] | None = None
    for way in bound.ways:
        if way.matcher is None:
            return _imperative_miss(network, bound, way)
        for layer in network:
            if not way.accepts(layer):
                continue
            matched, registers = way.matcher.attempt(layer)
            if matched and (reason := _refusal(network, way, registers)) is None:
                return None
            if matched:
                return Miss(bound.label, layer.name, len(registers), reason)
            written = len(registers) - registers.count(None)
            if best is None or written > best[0]:
                best = written, layer, way, registers
    if best is None:
        return Miss(bound.label, "", 0, f"the network has no {_wanted(bound)}")
    written, layer, way, registers = best
    depth, reason = why(way.matcher.sources, layer, way.matcher.constraints)  # type: ignore[union-attr]
    return Miss(bound.label, layer.name, depth, reason)


def _wanted(bound: BoundRule) -> str:
    ops = [op for way in bound.ways for op in (way.matcher.ops or ())] if bound.ways[0].matcher else bound.roots or ()
    return " and no ".join(sorted({operator_name(op) if hasattr(op, "_schema") else str(op) for op in ops})) or "layer"


def _refusal(network: Network, way: Way, registers: Registers) -> str | None:
    """Why `check` refuses a match."""
    if way.check is None:
        return None
    registers[2], registers[3] = network, way.rule.args
    try:
        with network.guarded(append=False):
            verdict = way.check(registers)
    except MatchFailure as failure:
        return str(failure) or "check declined"
    return None if verdict is None or verdict else "check returned False"


def _imperative_miss(network: Network, bound: BoundRule, way: Way) -> Miss | None:
    """An imperative rule can be asked for its reasons only."""
    last = None
    for layer in network:
        if way.accepts(layer):
            reason = _refusal(network, way, [layer, None, network, bound.args])
            if reason is None:
                return None
            last = Miss(bound.label, layer.name, 0, reason)
    return last or Miss(bound.label, "", 0, f"the network has no {_wanted(bound)}")


def why(sources, layer, constraints):
    return 0, ""
