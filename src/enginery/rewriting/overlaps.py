"""Which rules of a phase compete for the same layers, and whether their order matters there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from enginery.errors import RewriteError
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.binding import BoundRule, bind
from enginery.rewriting.explain import refusal
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.run import Run
from enginery.rewriting.structure import structure


@dataclass(frozen=True)
class Overlap:
    """Two rules whose matches share layers of a network."""

    first: str
    second: str
    layers: tuple[str, ...]
    """the shared layers"""
    order_matters: bool
    """the network ends up different if the other rule of the two goes first"""

    def __str__(self) -> str:
        end = "their order decides the result" if self.order_matters else "in either order with the same result"
        return f"{self.first} and {self.second} both match at {', '.join(self.layers)}: {end}"


def overlaps(network: Network, rules: Sequence[PatternRewriter]) -> list[Overlap]:
    """Every pair of declarative rules that compete on this network. The network is not changed: copies are
    rewritten.
    """
    bound = [bind(type(rule).__name__, rule) for rule in rules]
    matched = {rule.label: _matched_layers(network, rule) for rule in bound}
    found = []
    for first, second in combinations(bound, 2):
        shared = matched[first.label] & matched[second.label]
        if shared:
            names = tuple(layer.name for layer in sorted(shared, key=lambda layer: layer.order))
            found.append(Overlap(first.label, second.label, names, _order_matters(network, first, second)))
    return found


def _matched_layers(network: Network, rule: BoundRule) -> set[Layer]:
    found: set[Layer] = set()
    for layer in network:
        for way in rule.ways:
            if way.matcher is not None and way.matcher.accepts(layer):
                matched, registers = way.matcher.attempt(layer)
                if matched and refusal(network, way, registers) is None:
                    found |= way.matcher.layers(registers).keys()
    return found


def _order_matters(network: Network, first: BoundRule, second: BoundRule) -> bool:
    try:
        return _result(network, first, second) != _result(network, second, first)
    except RewriteError:
        return True


def _result(network: Network, *ordered: BoundRule) -> list[str]:
    """The calls that result if these rules run in this order, names left out."""
    copy = network.copy()
    for rule in ordered:
        Run(copy, [rule], {}, limit=10 * len(copy) + 1000).run()
    return structure(copy)
