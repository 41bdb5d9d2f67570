"""Collecting facts about a network by patterns. Nothing can be changed through an analyzer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from enginery.errors import RULE_ERRORS, EngineryError, RewriteError, UsageError, in_one_line
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.binding import Action, accepts_root, tie
from enginery.rewriting.matcher import ARGS, NETWORK, ROOT, Matcher, Registers
from enginery.rewriting.pattern import Pattern
from enginery.rewriting.rule import MatchFailure


class PatternAnalyzer:
    """`pattern`, or `root_layer` and `match(layer) -> bool`; and `analyze(captures…) -> fact`.

    `analyze` takes captures by parameter name, `root`, `network` and `args` among them. None is no fact.
    """

    pattern: ClassVar[Pattern | Sequence[Pattern] | None] = None
    where: ClassVar[Sequence[Any]] = ()
    root_layer: ClassVar[Collection[Any] | None] = None
    benefit: ClassVar[int] = 0
    args: Mapping[str, Any] = {}

    def match(self, layer: Layer) -> bool:
        return True

    def analyze(self, *captures: Any) -> Any:
        raise NotImplementedError


@dataclass
class Analysis:
    """The facts of each analyzer, in execution order of the layers they were found at."""

    facts: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    """label -> (name of the layer, fact)"""

    def __getitem__(self, label: str) -> list[Any]:
        return [fact for _, fact in self.facts[label]]


@dataclass(slots=True, eq=False)
class _BoundAnalyzer:
    label: str
    source: Any
    benefit: int
    matcher: Matcher | None
    analyze: Action

    def accepts(self, layer: Layer) -> bool:
        if self.matcher is not None:
            return self.matcher.accepts(layer)
        return accepts_root(layer, self.source.root_layer)


class AnalysisPatternManager:
    """Offers every layer to every analyzer once, those of higher benefit first."""

    def __init__(self, *analyzers: PatternAnalyzer) -> None:
        self._analyzers: dict[str, _BoundAnalyzer] = {}
        for analyzer in analyzers:
            self.add(analyzer)

    def add(
        self, label: str | PatternAnalyzer, analyzer: PatternAnalyzer | None = None, benefit: int | None = None
    ) -> None:
        if not isinstance(label, str):
            return self.add(type(label).__name__, label, benefit)
        if analyzer is None or label in self._analyzers:
            raise RewriteError(f"two analyzers are labelled {label}", "Give one of them another label", rule=label)
        try:
            self._analyzers[label] = _bind(label, analyzer, benefit)
        except EngineryError as error:
            raise RewriteError(f"analyzer {label}: {error.cause}", error.fix, rule=label) from error
        return None

    def get(self, label: str) -> PatternAnalyzer:
        return self._analyzers[label].source

    def analyze(self, network: Network, *, args: Mapping[str, Any] | None = None) -> Analysis:
        """Raises RewriteError, naming analyzer and layer, if one raises or tries to change the network."""
        analysis = Analysis({label: [] for label in self._analyzers})
        ordered = sorted(self._analyzers.values(), key=lambda analyzer: -analyzer.benefit)
        with network.guarded(append=False):
            for layer in network:
                for bound in ordered:
                    if bound.accepts(layer):
                        fact = _fact(bound, network, layer, args or {})
                        if fact is not None:
                            analysis.facts[bound.label].append((layer.name, fact))
        return analysis


def _bind(label: str, analyzer: Any, benefit: int | None) -> _BoundAnalyzer:
    matcher = None
    if analyzer.pattern is not None:
        roots = (analyzer.pattern,) if isinstance(analyzer.pattern, Pattern) else tuple(analyzer.pattern)
        matcher = Matcher(roots, tuple(analyzer.where))
    if type(analyzer).analyze is PatternAnalyzer.analyze:
        raise UsageError("it has no analyze", "Define analyze(captures...)")
    action = tie(analyzer.analyze, matcher.names if matcher is not None else {"layer": ROOT})
    return _BoundAnalyzer(label, analyzer, analyzer.benefit if benefit is None else benefit, matcher, action)


def _fact(bound: _BoundAnalyzer, network: Network, layer: Layer, args: Mapping[str, Any]) -> Any:
    try:
        registers: Registers = [layer, None, None, None]
        if bound.matcher is not None:
            matched, registers = bound.matcher.attempt(layer)
        else:
            matched = bound.source.match(layer)
        if not matched:
            return None
        registers[NETWORK], registers[ARGS] = network, {**bound.source.args, **args}
        return bound.analyze(registers)
    except MatchFailure:
        return None
    except RULE_ERRORS as error:
        cause = f"analyzer {bound.label} raised {in_one_line(error)} (at layer {layer.name})"
        raise RewriteError(cause, "Correct the analyzer", rule=bound.label, layer=layer.name) from error
