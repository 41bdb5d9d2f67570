"""What a rule says to a layer: it declines, or what is to replace the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from enginery.network.layer import Layer
from enginery.network.network import APPEND_ONLY, Network
from enginery.rewriting.binding import Way
from enginery.rewriting.matcher import ARGS, NETWORK, REASON, Registers
from enginery.rewriting.report import RuleReport
from enginery.rewriting.rule import MatchFailure


@dataclass(slots=True, eq=False)
class Candidate:
    """A way into a rule, with what a run keeps for it."""

    way: Way
    fact: RuleReport
    args: Mapping[str, Any]


class Proposal(NamedTuple):
    matched: bool
    reason: str | None
    """why the rule declines; None if it does not, or if its pattern does not fit"""
    registers: Registers
    result: Any
    """what its code returned; None if it declines"""


def propose(candidate: Candidate, layer: Layer, network: Network) -> Proposal:
    """What a rule says to a layer. New layers go to the network's cursor."""
    fits, registers = match(candidate, layer)
    return consult(candidate, registers, network) if fits else Proposal(False, registers[REASON], registers, None)


def match(candidate: Candidate, layer: Layer) -> tuple[bool, Registers]:
    """Whether the pattern fits, if the rule has one, and what it captured."""
    matcher = candidate.way.matcher
    if matcher is None:
        return True, [layer, None, None, None]
    registers = matcher.blank.copy()
    return matcher.step(layer.outputs[matcher.output], registers), registers


def consult(candidate: Candidate, registers: Registers, network: Network) -> Proposal:
    """Runs the rule's code."""
    way = candidate.way
    registers[NETWORK], registers[ARGS] = network, candidate.args
    matched = way.matcher is not None
    guard = network._guard
    network._guard = APPEND_ONLY
    try:
        if way.check is not None:
            verdict = way.check(registers)
            if verdict is not None and not verdict:
                return Proposal(matched, f"{'check' if matched else 'match'} returned False", registers, None)
            matched = True
        result = way.rewrite(registers)
    except MatchFailure as failure:
        return Proposal(matched, str(failure) or "MatchFailure", registers, None)
    finally:
        network._guard = guard
    if result is None or result is False:
        return Proposal(matched, "rewrite returned None", registers, None)
    return Proposal(True, None, registers, result)
