"""Testing a rule: what it does to a network, and that it computes the same.

assert_rewrites(before, after, MyRule())      # structure and numbers
equivalence_test(MyRule())()                  # numbers, on a network made from the rule's own pattern
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from enginery.errors import UsageError
from enginery.network.network import Network
from enginery.rewriting import numerics
from enginery.rewriting.explain import explain
from enginery.rewriting.manager import RewritePatternManager
from enginery.rewriting.report import Report
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.structure import structure
from enginery.rewriting.synthesis import network_for


def assert_rewrites(
    before: Network | torch.nn.Module,
    after: Network | torch.nn.Module | str,
    rule: PatternRewriter | Sequence[PatternRewriter],
    *,
    args: tuple = (),
    dynamic_shapes: Any = None,
    numerics_too: bool = True,
) -> Report:
    """The rule turns `before` into `after`, and the outputs stay equal on seeded inputs.

    Networks, modules (exported with the example inputs `args`), or for `after` the text of a network. Names of
    layers, their order among independent ones and provenance do not matter. Raises AssertionError with the
    difference, or the nearest miss.
    """
    rules = [rule] if isinstance(rule, PatternRewriter) else list(rule)
    network = _network(before, args, dynamic_shapes)
    values = numerics.sample_values(network)
    expected = numerics.run(network, values) if numerics_too else ()
    report = RewritePatternManager(*rules).rewrite(network)
    if not report.rewritten:
        misses = "; ".join(str(explain(network, one) or f"{type(one).__name__} matches, but declined") for one in rules)
        raise AssertionError(f"nothing was rewritten: {misses} {_reasons(report)}")
    wanted = Network.parse(after) if isinstance(after, str) else _network(after, args, dynamic_shapes)
    found, needed = structure(network), structure(wanted)
    if found != needed:
        raise AssertionError("the rewritten network is not the expected one\n" + _difference(found, needed))
    if numerics_too:
        difference = numerics.difference(expected, numerics.run(network, values), network.output_names)
        if difference:
            raise AssertionError(f"the rewritten network computes something else: {difference}")
    return report


def equivalence_test(rule: PatternRewriter, *, dtype: torch.dtype = torch.float64, **inputs: Any) -> Callable[[], None]:
    """A numeric test made from the rule itself: its pattern becomes a network, is rewritten, and both are run.

    Shapes of captures are found by trial; where a rule needs particular ones, give them by name as shapes or as torch
    tensors: `equivalence_test(rule, x=(4, 8), w=(8, 8))`; scalars likewise: `eps=1e-6`. Raises UsageError if
    no network can be made, when called here; the test raises AssertionError if the rule does not apply or changes
    an output.
    """
    network = network_for(rule, dtype, inputs)

    def test() -> None:
        candidate = network.copy()
        values = numerics.sample_values(candidate, {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        expected = numerics.run(candidate, values)
        report = RewritePatternManager(rule).rewrite(candidate)
        if not report.rewritten:
            raise AssertionError(
                f"{type(rule).__name__} did not apply to its own pattern: {_reasons(report)}\n{candidate}"
            )
        difference = numerics.difference(expected, numerics.run(candidate, values), candidate.output_names)
        if difference:
            raise AssertionError(f"{type(rule).__name__} changes the result: {difference}\n{network}\n→\n{candidate}")

    test.__name__ = f"test_{type(rule).__name__}_is_an_equivalence"
    return test


def _network(source: Network | torch.nn.Module, args: tuple, dynamic_shapes: Any) -> Network:
    if isinstance(source, Network):
        return source.copy()
    if isinstance(source, torch.nn.Module):
        return Network.from_module(source, args, dynamic_shapes=dynamic_shapes)
    raise UsageError(f"{type(source).__name__} is neither a Network nor a module")


def _difference(found: Sequence[str], needed: Sequence[str]) -> str:
    for i in range(max(len(found), len(needed))):
        mine = found[i] if i < len(found) else "(nothing)"
        theirs = needed[i] if i < len(needed) else "(nothing)"
        if mine != theirs:
            return f"rewritten: {mine}\nexpected:  {theirs}\n\n" + "\n".join(found)
    return ""


def _reasons(report: Report) -> str:
    reasons: Mapping[str, int] = {
        f"{rule.label}: {reason}": count for rule in report.rules.values() for reason, count in rule.declined.items()
    }
    return f"({', '.join(reasons)})" if reasons else ""
