"""One run of a manager over one network: the worklist, and what happens to what a rule returns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from enginery.errors import EngineryError, RewriteError, RewriteLimitError
from enginery.network.collection import paused_collection
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.binding import BoundRule, Way
from enginery.rewriting.edit import Edit, Pair
from enginery.rewriting.effects import Effects
from enginery.rewriting.matcher import ARGS, NETWORK, REASON, Registers, escapes
from enginery.rewriting.ordering import put_in_order
from enginery.rewriting.replacement import pairs_of
from enginery.rewriting.report import Application, Report, RuleReport
from enginery.rewriting.rule import MatchFailure


@dataclass(slots=True, eq=False)
class Candidate:
    """A way into a rule, with what this run keeps for it."""

    way: Way
    fact: RuleReport
    args: Mapping[str, Any]

    def decline(self, reason: str) -> None:
        self.fact.declined[reason] += 1


class Run:
    """Not reusable. After `run`, `undo` takes all of it back."""

    def __init__(
        self, network: Network, rules: Sequence[BoundRule], args: Mapping[str, Any], *, limit: int,
        stop_after: int | None = None, without: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`limit` applications are an error; after `stop_after` of them the run ends. Rules in `without` stay
        out of it.
        """
        self.network = network
        self.limit, self.stop_after = limit, stop_after
        self.report = Report(layers_before=len(network), layers_after=len(network))
        self._candidates: list[Candidate] = []
        for rule in rules:
            fact = RuleReport(rule.label, rule.location, rule.benefit)
            self.report.rules[rule.label] = fact
            own = {**rule.args, **args}
            if rule.label not in without:
                self._candidates += [Candidate(way, fact, own) for way in rule.ways]
        self._candidates.sort(key=lambda candidate: -candidate.way.rule.benefit)
        self._by_op: dict[int, tuple[Candidate, ...]] = {}
        """by the identity of the operator: hashing an OpOverload costs more than a rejected match"""
        self._reach = max((rule.height for rule in rules), default=1)
        self._queue: deque[Layer] = deque()
        self._queued: set[Layer] = set()
        self._effects = Effects()
        self._journal: list[Edit] = []

    def run(self) -> Report:
        start = perf_counter()
        with paused_collection():
            for layer in self.network:
                self._enter(layer)
            self._drain()
        self.report.layers_after = len(self.network)
        self.report.milliseconds = (perf_counter() - start) * 1e3
        return self.report

    def undo(self) -> None:
        while self._journal:
            self._journal.pop().undo()

    # The worklist

    def _drain(self) -> None:
        queue, queued, by_op, journal = self._queue, self._queued, self._by_op, self._journal
        clock = perf_counter()
        while queue:
            layer = queue.popleft()
            queued.discard(layer)
            if layer.is_removed:
                continue
            edit = Edit(self.network, layer)
            for candidate in by_op[id(layer.op)]:
                done = self._offer(candidate, layer, edit)
                now = perf_counter()
                candidate.fact.milliseconds += (now - clock) * 1e3
                clock = now
                if done:
                    break
            if len(journal) > self.limit:
                raise self._limit_error(layer)
            if len(journal) == self.stop_after:
                return

    def _enter(self, layer: Layer) -> None:
        if layer.has_effects:
            self._effects.note(layer)
        candidates = self._by_op.get(id(layer.op))
        if candidates is None:
            candidates = self._candidates_of(layer)
        if candidates and layer not in self._queued:
            self._queued.add(layer)
            self._queue.append(layer)

    def _candidates_of(self, layer: Layer) -> tuple[Candidate, ...]:
        found = tuple([candidate for candidate in self._candidates if candidate.way.accepts(layer)])
        self._by_op[id(layer.op)] = found
        return found

    def _tell(self, edit: Edit, pairs: Sequence[Pair], erased: Sequence[Layer]) -> None:
        """Queues all that a change may have made matchable.

        That is: the new layers, the users of new values as far down as patterns reach, the producers of what
        new and erased layers read, and whoever is left as the only user of such a value.
        """
        for layer in edit.added:
            self._enter(layer)
        level = [user for _, new in pairs for user in new._uses]
        touched = level
        for _ in range(self._reach - 2):
            level = list(dict.fromkeys([user for layer in level for output in layer.outputs for user in output._uses]))
            touched = touched + level
        for layer in (*edit.added, *erased):
            for tensor in layer._inputs:
                if tensor.parent is not None:
                    touched.append(tensor.parent)
                if len(tensor._uses) == 1:
                    touched.extend(tensor._uses)
        by_op, queued, queue = self._by_op, self._queued, self._queue
        for layer in touched:
            candidates = by_op.get(id(layer.op))
            if candidates is None:
                candidates = self._candidates_of(layer)
            if candidates and layer not in queued:
                queued.add(layer)
                queue.append(layer)

    # One offer

    def _offer(self, candidate: Candidate, layer: Layer, edit: Edit) -> bool:
        """Whether the rule changed the network."""
        try:
            registers, result = self._propose(candidate, layer)
            if result is not None:
                edit.collect()
                self._carry_out(candidate, edit, registers, result)
                return True
        except MatchFailure as failure:
            candidate.decline(str(failure) or "MatchFailure")
        except RewriteError:
            edit.abandon()
            raise
        except Exception as error:
            edit.abandon()
            detail = error.cause if isinstance(error, EngineryError) else f"{type(error).__name__}: {error}"
            raise _broken(candidate.way, layer, f"raised {detail}", "Correct the rule") from error
        edit.abandon()
        return False

    def _propose(self, candidate: Candidate, layer: Layer) -> tuple[Registers, Any]:
        """Runs the rule's code: the captures, and what it returned; None if it declined."""
        way, fact = candidate.way, candidate.fact
        matcher = way.matcher
        fact.tried += 1
        if matcher is None:
            registers: Registers = [layer, None, None, None]
        else:
            registers = matcher.blank.copy()
            if not matcher.step(layer.outputs[matcher.output], registers):
                if registers[REASON] is not None:
                    candidate.decline(registers[REASON])
                return registers, None
            fact.matched += 1
        registers[NETWORK], registers[ARGS] = self.network, candidate.args
        with self.network.appending_before(layer):
            if way.check is not None:
                verdict = way.check(registers)
                if verdict is not None and not verdict:
                    candidate.decline("match returned False" if matcher is None else "check returned False")
                    return registers, None
                fact.matched += matcher is None
            result = way.rewrite(registers)
        if result is None or result is False:
            candidate.decline("rewrite returned None")
            return registers, None
        if matcher is None and way.check is None:
            fact.matched += 1
        return registers, result

    def _carry_out(self, candidate: Candidate, edit: Edit, registers: Registers, result: Any) -> None:
        """Makes the change that a rule asked for, or raises MatchFailure where it cannot be."""
        way, root = candidate.way, edit.root
        matcher = way.matcher
        if matcher is None:
            roots, matched, output = [root], {root: None}, 0
        else:
            roots, output = [registers[slot] for slot in matcher.roots], matcher.output
            matched = matcher.layers(registers)
        try:
            pairs = pairs_of(result, roots, output)
        except TypeError as error:
            raise _broken(way, root, str(error), "Return a Tensor, a tuple, a dictionary or None") from None
        _check_types(way, root, pairs)
        replaced = {old.parent: None for old, _ in pairs if old.parent is not None}
        matched.update(replaced)
        if matcher is not None and matcher.policies:
            _check_returns(way, root, registers, replaced, matched)
        put_in_order(edit, pairs, self._effects)
        removes = way.rule.source.removes_effects
        self._effects.check(pairs, replaced, matched, edit.added, removes=removes, whole=matcher is not None)
        self._commit(candidate, edit, pairs, replaced, matched)
        if matcher is not None and matcher.policies:
            _copy_escapes(matcher, registers, edit)

    def _commit(
        self, candidate: Candidate, edit: Edit, pairs: Sequence[Pair], replaced: Mapping[Layer, None],
        matched: Mapping[Layer, None],
    ) -> None:  # fmt: skip
        rule, root = candidate.way.rule, edit.root
        names = tuple([layer.name for layer in matched])
        edit.sign(rule.label, names)
        erased: list[Layer] = []
        for old, new in pairs:
            edit.replace(old, new)
            if len(pairs) > 1 and old.parent is not None:  # a root that is gone need not be given its new inputs
                erased += edit.erase_unused(replaced, (old.parent,))
        if rule.source.changes_shape or rule.source.changes_dtype:
            edit.retype(pairs)
        erased += edit.erase_unused(replaced, matched)
        self._journal.append(edit)
        candidate.fact.rewritten += 1
        added = tuple([layer.name for layer in edit.added])
        gone = tuple([layer.name for layer in erased])
        self.report.applications.append(Application(rule.label, root.name, root.module_path, names, added, gone))
        self._tell(edit, pairs, erased)

    def _limit_error(self, layer: Layer) -> RewriteLimitError:
        recent = self.report.applications[len(self.report.applications) // 2 :]
        counts = Counter(application.rule for application in recent).most_common()
        self.undo()
        text = ", ".join(f"{rule} {count} times" for rule, count in counts)
        return RewriteLimitError(
            f"more than {self.limit} rewrites, the last ones by {text} (now at layer {layer.name})",
            "Make the rule decline its own output, or raise limit=",
            rule=counts[0][0],
            layer=layer.name,
        )


def _broken(way: Way, layer: Layer, what: str, fix: str = "") -> RewriteError:
    label = way.rule.label
    cause = f"rule {label} {what} (at layer {layer.name}; {way.rule.location})"
    return RewriteError(cause, fix, rule=label, layer=layer.name)


def _check_types(way: Way, root: Layer, pairs: Sequence[Pair]) -> None:
    rule, network = way.rule.source, root.network
    for old, new in pairs:
        if new.network is not network or (new.parent is not None and new.parent.is_removed):
            raise _broken(way, root, f"returned {new.name}, which is not in this network")
        if (new.shape != old.shape and not rule.changes_shape) or (new.dtype != old.dtype and not rule.changes_dtype):
            fix = "Cast or reshape the replacement, or declare changes_dtype or changes_shape on the rule"
            raise _broken(way, root, f"returned {new!r} for {old!r}", fix)


def _check_returns(
    way: Way, root: Layer, registers: Registers, replaced: Mapping[Layer, None], matched: Mapping[Layer, None]
) -> None:
    assert way.matcher is not None  # noqa: S101  (only declarative rules have policies)
    for slot, policy in way.matcher.policies:
        inner = registers[slot]
        if policy == "return" and inner is not None and inner not in replaced and escapes(inner, matched):
            fix = f"Return {{root: ..., {inner.name}: ...}} or one value per root"
            raise _broken(way, root, f"returned no replacement for {inner.name}, which has users outside", fix)


def _copy_escapes(matcher: Any, registers: Registers, edit: Edit) -> None:
    """Gives outside users of an inner layer with the policy `clone` a copy right before the first of them."""
    for slot, policy in matcher.policies:
        layer = registers[slot]
        if policy != "clone" or layer is None or layer.is_removed or not layer.users:
            continue
        with edit.network.inserting_before(layer.users[0], provenance=layer.provenance):
            copy = edit.network.add_layer(layer.op, layer.args)
        edit.added.append(copy)
        for old, new in zip(layer.outputs, copy.outputs, strict=True):
            edit.replace(old, new)
        edit.erase_unused((), [layer])
