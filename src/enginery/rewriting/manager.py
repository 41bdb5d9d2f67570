"""The driver: a worklist of layers, fed by the changes that rules make."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from enginery.errors import EngineryError, RewriteError, RewriteLimitError
from enginery.network.layer import Layer, tensors_in
from enginery.network.network import Network
from enginery.network.operator import signature
from enginery.network.tensor import Tensor
from enginery.rewriting.binding import BoundRule, Way, bind
from enginery.rewriting.edit import Edit, Pair, pairs_of, put_in_order, sign
from enginery.rewriting.matcher import ARGS, NETWORK, REASON, Registers, escapes
from enginery.rewriting.report import Application, Report, RuleReport
from enginery.rewriting.rule import MatchFailure, PatternRewriter


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
            label, rule = type(label).__name__, label
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
        self, network: Network, *, verify: Any = None, limit: int | None = None, args: dict[str, Any] | None = None
    ) -> Report:
        """Applies the rules until none of them fits any more.

        `limit` bounds the number of applications (default: ten per layer and a thousand). `args` reach rules as `args`.
        Raises RewriteError if a rule breaks its contract; the network is then as before that application of the rule.
        """
        phase = _Phase(network, list(self._rules.values()), args or {}, limit)
        phase.run()
        if hasattr(network, "verify"):
            network.verify()
        return phase.report


class _Phase:
    """One run over one network."""

    def __init__(self, network: Network, rules: list[BoundRule], args: dict[str, Any], limit: int | None) -> None:
        self.network = network
        ordered = sorted(rules, key=lambda rule: -rule.benefit)
        self._ways = [way for rule in ordered for way in rule.ways]
        self._args = {rule.label: {**rule.args, **args} for rule in rules}
        self._by_op: dict[int, tuple[Way, ...]] = {}
        """by the identity of the operator: hashing an OpOverload costs more than a rejected match"""
        self._reach = max((rule.height for rule in rules), default=1)
        self._limit = limit if limit is not None else 10 * len(network) + 1000
        self._journal: list[Edit] = []
        self._queue: deque[Layer] = deque()
        self._queued: set[Layer] = set()
        self._mutable: dict[Tensor, list[Layer]] = {}
        self.report = Report(layers_before=len(network))
        self._facts = {}
        for rule in rules:
            fact = RuleReport(rule.label, rule.location, rule.benefit)
            self.report.rules[rule.label] = self._facts[rule.label] = fact

    def run(self) -> None:
        start = perf_counter()
        with _no_collection():
            for layer in self.network:
                self._enter(layer)
            queue, queued = self._queue, self._queued
            while queue:
                layer = queue.popleft()
                queued.discard(layer)
                if not layer.is_removed:
                    self._offer(layer)
        self.report.layers_after = len(self.network)
        self.report.milliseconds = (perf_counter() - start) * 1e3

    def _enter(self, layer: Layer) -> None:
        """Notes the effects of a layer and queues it if a rule may want it."""
        if layer.has_effects:
            for place in signature(layer.op).written:
                for tensor in tensors_in(layer._args[place]):
                    self._mutable.setdefault(tensor, []).append(layer)
        self._push(layer)

    def _push(self, layer: Layer) -> None:
        ways = self._by_op.get(id(layer.op))
        if ways is None:
            ways = self._by_op[id(layer.op)] = tuple([way for way in self._ways if way.accepts(layer)])
        if ways and layer not in self._queued:
            self._queued.add(layer)
            self._queue.append(layer)

    def _offer(self, layer: Layer) -> None:
        clock = perf_counter()
        for way in self._by_op[id(layer.op)]:
            fact = self._facts[way.rule.label]
            fact.tried += 1
            edit = self._try(way, layer, fact)
            now = perf_counter()
            fact.milliseconds += (now - clock) * 1e3
            clock = now
            if edit is not None:
                if len(self._journal) > self._limit:
                    raise self._limit_error(layer)
                return

    def _try(self, way: Way, layer: Layer, fact: RuleReport) -> Edit | None:
        matcher = way.matcher
        if matcher is None:
            registers: Registers = [layer, None, None, None]
        else:
            matched, registers = matcher.attempt(layer)
            if not matched:
                if registers[REASON] is not None:
                    fact.declined[registers[REASON]] += 1
                return None
        registers[NETWORK], registers[ARGS] = self.network, self._args[way.rule.label]
        edit = Edit(self.network, layer)
        try:
            reason = self._apply(way, layer, registers, edit, fact)
        except MatchFailure as failure:
            reason = str(failure) or "MatchFailure"
        except RewriteError:
            self._take_back(edit, layer)
            raise
        except Exception as error:
            self._take_back(edit, layer)
            detail = error.cause if isinstance(error, EngineryError) else f"{type(error).__name__}: {error}"
            raise self._error(way, layer, f"raised {detail}", "Correct the rule") from error
        if reason is None:
            return edit
        self._take_back(edit, layer)
        fact.declined[reason] += 1
        return None

    def _take_back(self, edit: Edit, root: Layer) -> None:
        if not edit.added:
            edit.collect(root)
        edit.undo()

    def _apply(self, way: Way, layer: Layer, registers: Registers, edit: Edit, fact: RuleReport) -> str | None:
        """Runs the rule's code and carries out what it returns. Gives the reason if it declines."""
        network, matcher = self.network, way.matcher
        with network.inserting_before(layer), network.guarded(append=True):
            if way.check is not None:
                verdict = way.check(registers)
                if verdict is not None and not verdict:
                    return "match returned False" if matcher is None else "check returned False"
            if matcher is not None:
                fact.matched += 1
            result = way.rewrite(registers)
        if result is None or result is False:
            return "rewrite returned None"
        if matcher is None:
            fact.matched += 1
        roots = [layer] if matcher is None else [registers[slot] for slot in matcher.roots]
        added = edit.collect(layer)
        try:
            pairs = pairs_of(result, roots, 0 if matcher is None else matcher.output)
        except TypeError as error:
            raise self._error(way, layer, str(error), "Return a Tensor, a tuple, a dictionary or None") from None
        self._check_types(way, layer, pairs)
        replaced = dict.fromkeys(old.parent for old, _ in pairs if old.parent is not None)
        matched = {**replaced, **dict.fromkeys(roots if matcher is None else matcher.layers(registers))}
        if matcher is not None:
            self._check_returns(way, layer, matcher, registers, replaced, matched)
        put_in_order(edit, pairs, self._mutable)
        self._check_effects(way, replaced, matched, added)
        self._carry_out(way, layer, edit, pairs, replaced, matched, fact)
        if matcher is not None:
            self._copy_escapes(way, matcher, registers, edit)
        return None

    def _carry_out(
        self, way: Way, root: Layer, edit: Edit, pairs: Sequence[Pair], replaced: Iterable[Layer],
        matched: Iterable[Layer], fact: RuleReport,
    ) -> None:  # fmt: skip
        names = tuple(layer.name for layer in matched)
        sign(edit, way.rule.label, names)
        edit.replace(pairs)
        erased = edit.erase_unused(replaced, matched)
        self._journal.append(edit)
        fact.rewritten += 1
        added = tuple(layer.name for layer in edit.added)
        self.report.applications.append(Application(way.rule.label, root.name, root.module_path, names, added))
        self._tell(edit, pairs, erased)

    def _tell(self, edit: Edit, pairs: Sequence[Pair], erased: Sequence[Layer]) -> None:
        """Queues what a change may have made matchable: new layers, users of new values, and producers that lost a user."""
        for layer in edit.added:
            self._enter(layer)
        frontier = [new for _, new in pairs]
        for _ in range(self._reach - 1 or 1):
            users = {user: None for tensor in frontier for user in tensor._uses}
            for user in users:
                self._push(user)
            frontier = [output for user in users for output in user.outputs]
        for layer in (*edit.added, *erased):
            for tensor in layer.inputs:
                parent = tensor.parent
                if parent is not None and not parent.is_removed:
                    self._push(parent)
                if len(tensor._uses) == 1:
                    (only,) = tensor._uses
                    self._push(only)

    def _check_types(self, way: Way, root: Layer, pairs: Sequence[Pair]) -> None:
        rule = way.rule.source
        for old, new in pairs:
            if new.network is not self.network or (new.parent is not None and new.parent.is_removed):
                raise self._error(way, root, f"returned {new.name}, which is not in this network")
            if (new.shape != old.shape and not rule.changes_shape) or (
                new.dtype != old.dtype and not rule.changes_dtype
            ):
                fix = "Cast or reshape the replacement, or declare changes_dtype or changes_shape on the rule"
                raise self._error(way, root, f"returned {new!r} for {old!r}", fix)

    def _check_returns(
        self, way: Way, root: Layer, matcher: Any, registers: Registers, replaced: Any, matched: Any
    ) -> None:
        for slot, policy in matcher.policies:
            inner = registers[slot]
            if policy == "return" and inner is not None and inner not in replaced and escapes(inner, matched):
                raise self._error(way, root, f"did not return a replacement for {inner.name}, which has users outside")

    def _check_effects(
        self, way: Way, replaced: Iterable[Layer], matched: Iterable[Layer], added: Sequence[Layer]
    ) -> None:
        if not way.rule.source.removes_effects:
            for layer in replaced:
                if layer.has_effects and not _covers(added, layer):
                    raise MatchFailure(f"it would remove the effect of {layer.name}")
        if self._mutable and added:
            earliest = min(layer.order for layer in matched)
            for layer in added:
                for tensor in layer.inputs:
                    for writer in self._mutable.get(tensor, ()):
                        if not writer.is_removed and writer not in matched and earliest < writer.order < layer.order:
                            raise MatchFailure(f"it would read {tensor.name} after {writer.name} wrote to it")

    def _copy_escapes(self, way: Way, matcher: Any, registers: Registers, edit: Edit) -> None:
        """Gives outside users of an inner layer with the policy `clone` a copy right before the first of them."""
        for slot, policy in matcher.policies:
            layer = registers[slot]
            if policy != "clone" or layer is None or layer.is_removed:
                continue
            first = min(layer.users, key=lambda user: user.order, default=None)
            if first is None:
                continue
            with self.network.inserting_before(first):
                copy = self.network.add_layer(layer.op, layer._args)
            edit.added.append(copy)
            edit.replace(list(zip(layer.outputs, copy.outputs, strict=True)))
            edit.erase_unused((), [layer])

    def _error(self, way: Way, layer: Layer, what: str, fix: str = "") -> RewriteError:
        label = way.rule.label
        cause = f"rule {label} {what} (at layer {layer.name}; {way.rule.location})"
        return RewriteError(cause, fix, rule=label, layer=layer.name)

    def _limit_error(self, layer: Layer) -> RewriteLimitError:
        recent = self.report.applications[len(self.report.applications) // 2 :]
        counts = Counter(application.rule for application in recent).most_common()
        self.undo()
        text = ", ".join(f"{rule} {count} times" for rule, count in counts)
        return RewriteLimitError(
            f"more than {self._limit} rewrites, the last ones by {text} (now at layer {layer.name})",
            "Make the rule decline its own output, or raise limit=",
            rule=counts[0][0],
            layer=layer.name,
        )

    def undo(self) -> None:
        """Takes back the whole phase."""
        while self._journal:
            self._journal.pop().undo()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Puts the cycle collector off: a phase makes many objects and drops none, and full collections would dominate it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _covers(added: Sequence[Layer], old: Layer) -> bool:
    """Some new layer has the effects of the old one: writes what it wrote, draws if it drew."""
    known = signature(old.op)
    written = {old._args[place] for place in known.written}
    for layer in added:
        new = signature(layer.op)
        written -= {layer._args[place] for place in new.written}
        if known.random and new.random:
            return not written
    return not written and not known.random


__all__ = ["RewritePatternManager"]
