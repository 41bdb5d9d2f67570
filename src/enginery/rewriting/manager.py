"""A set of rules, and what a user asks of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from enginery.errors import RewriteError
from enginery.network.collection import paused_collection
from enginery.network.network import Network
from enginery.rewriting.binding import BoundRule, bind
from enginery.rewriting.expectations import repeated_blocks, unmet_expectation
from enginery.rewriting.explain import Miss, nearest_miss
from enginery.rewriting.report import Report
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.run import Run
from enginery.rewriting.verification import run_verified


class RewritePatternManager:
    """An ordered set of rules. It keeps nothing of the networks that it rewrites, so threads may share it."""

    def __init__(self, *rules: PatternRewriter) -> None:
        self._rules: dict[str, BoundRule] = {}
        for rule in rules:
            self.add(rule)

    def add(
        self, label: str | PatternRewriter, rule: PatternRewriter | None = None, benefit: int | None = None
    ) -> None:
        """`add(rule)` or `add(label, rule)`; the label is the class name unless given. RewriteError if it is taken."""
        if not isinstance(label, str):
            label, rule = type(label).__name__, label  # type: ignore[assignment]
        if rule is None or label in self._rules:
            cause = f"two rules are labelled {label}" if rule is not None else f"no rule is given for the label {label}"
            raise RewriteError(cause, "Give one of them another label: add(label, rule)", rule=label)
        self._rules[label] = bind(label, rule, benefit)

    def get(self, label: str) -> PatternRewriter:
        return self._rules[label].source

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._rules)

    def rewrite(
        self,
        network: Network,
        *,
        verify: bool | Sequence[Any] | Mapping[str, Any] = False,
        limit: int | None = None,
        args: Mapping[str, Any] | None = None,
        remember: bool | None = None,
    ) -> Report:
        """Applies the rules until none of them fits any more.

        `verify`: run the network before and after on these inputs (True: seeded random ones), compare within
        the tolerance of the dtype, take back every rule that changed an output and say so in the report: the rules are
        then asked again from the state before the run, which one that keeps state must expect. `limit`
        bounds the number of applications (default: ten per layer and a thousand). `args` reach the rules as `args`,
        laid over their own. `remember`: pure rules are asked in one of several equal blocks and the answer is
        repeated in the others, with the same result (None: where that is likely to be faster).

        Raises RewriteError if a rule breaks its contract: the network is then as it was before that rule's application.
        Raises RewriteLimitError beyond `limit`, and RewriteError if a rule's `expect` is not met: as it was
        before this call.
        """
        bound = limit if limit is not None else 10 * len(network) + 1000
        rules = list(self._rules.values())

        def start(without: Collection[str], stop_after: int | None) -> Run:
            return Run(
                network, rules, args or {}, limit=bound, stop_after=stop_after, without=without, remember=remember
            )

        blocks = (
            repeated_blocks(layer.module_path for layer in network)
            if any(rule.source.expect for rule in rules)
            else frozenset()
        )
        if verify is not False:
            run = run_verified(network, start, verify)
        else:
            run = start((), None)
            run.run()
        broken = unmet_expectation(network, run.report, rules, blocks)
        if broken is not None:
            run.undo()
            raise broken
        with paused_collection():
            network.verify()
        return run.report

    def explain(self, network: Network, label: str | None = None) -> dict[str, Miss | None]:
        """The nearest miss of each rule (or of one); None where a rule would match. The network is not changed."""
        chosen = [self._rules[label]] if label is not None else list(self._rules.values())
        return {rule.label: nearest_miss(network, rule) for rule in chosen}


__all__ = ["RewritePatternManager"]
