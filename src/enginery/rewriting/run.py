"""One run of a manager over one network: the worklist, and what happens to what a rule returns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from enginery.errors import EngineryError, RewriteError, RewriteLimitError
from enginery.network.collection import paused_collection
from enginery.network.layer import Layer, tensors_in
from enginery.network.network import Network
from enginery.network.operator import signature
from enginery.network.tensor import Tensor
from enginery.rewriting.binding import BoundRule, Way
from enginery.rewriting.edit import Edit, Pair, pairs_of, put_in_order
from enginery.rewriting.matcher import ARGS, NETWORK, REASON, Registers, escapes
from enginery.rewriting.report import Application, Report, RuleReport
from enginery.rewriting.rule import MatchFailure


@dataclass(slots=True, eq=False)
class _Candidate:
    """A way into a rule, with what this run keeps for it."""

    way: Way
    fact: RuleReport
    args: Mapping[str, Any]


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
        self._candidates: list[_Candidate] = []
        for rule in rules:
            fact = RuleReport(rule.label, rule.location, rule.benefit)
            self.report.rules[rule.label] = fact
            own = {**rule.args, **args}
            if rule.label not in without:
                self._candidates += [_Candidate(way, fact, own) for way in rule.ways]
        self._candidates.sort(key=lambda candidate: -candidate.way.rule.benefit)
        self._by_op: dict[int, tuple[_Candidate, ...]] = {}
        """by the identity of the operator: hashing an OpOverload costs more than a rejected match"""
        self._reach = max((rule.height for rule in rules), default=1)
        self._queue: deque[Layer] = deque()
        self._queued: set[Layer] = set()
        self._writers: dict[Tensor, list[Layer]] = {}
        """the layers that write to a tensor"""
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
            for candidate in by_op[id(layer.op)]:
                done = self._offer(candidate, layer)
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
            for place in signature(layer.op).written:
                for tensor in tensors_in(layer.args[place]):
                    self._writers.setdefault(tensor, []).append(layer)
        self._push(layer)

    def _push(self, layer: Layer) -> None:
        candidates = self._by_op.get(id(layer.op))
        if candidates is None:
            candidates = tuple([candidate for candidate in self._candidates if candidate.way.accepts(layer)])
            self._by_op[id(layer.op)] = candidates
        if candidates and layer not in self._queued:
            self._queued.add(layer)
            self._queue.append(layer)

    def _tell(self, edit: Edit, pairs: Sequence[Pair], erased: Sequence[Layer]) -> None:
        """Queues all that a change may have made matchable.

        That is: the new layers, the users of new values as far down as patterns reach, the producers of what
        new and erased layers read, and whoever is left as the only user of such a value.
        """
        for layer in edit.added:
            self._enter(layer)
        touched: dict[Layer, None] = {}
        users = [user for _, new in pairs for user in new._uses]
        touched.update(dict.fromkeys(users))
        for _ in range(self._reach - 2):
            users = [user for layer in users for output in layer.outputs for user in output._uses]
            touched.update(dict.fromkeys(users))
        for layer in (*edit.added, *erased):
            for tensor in layer._inputs:
                parent = tensor.parent
                if parent is not None:
                    touched[parent] = None
                if len(tensor._uses) == 1:
                    touched.update(dict.fromkeys(tensor._uses))
        by_op, queued = self._by_op, self._queued
        for layer in touched:
            candidates = by_op.get(id(layer.op))
            if candidates is None:
                self._push(layer)
            elif candidates and layer not in queued:
                queued.add(layer)
                self._queue.append(layer)

    # One offer

    def _offer(self, candidate: _Candidate, layer: Layer) -> bool:
        """Whether the rule changed the network."""
        fact, matcher = candidate.fact, candidate.way.matcher
        fact.tried += 1
        if matcher is None:
            registers: Registers = [layer, None, None, None]
        else:
            registers = matcher.blank.copy()
            if not matcher.step(layer.outputs[matcher.output], registers):
                if registers[REASON] is not None:
                    fact.declined[registers[REASON]] += 1
                return False
            fact.matched += 1
        registers[NETWORK], registers[ARGS] = self.network, candidate.args
        edit = Edit(self.network, layer)
        try:
            reason = self._apply(candidate, layer, registers, edit)
        except MatchFailure as failure:
            reason = str(failure) or "MatchFailure"
        except RewriteError:
            edit.abandon(layer)
            raise
        except Exception as error:
            edit.abandon(layer)
            detail = error.cause if isinstance(error, EngineryError) else f"{type(error).__name__}: {error}"
            raise _broken(candidate.way, layer, f"raised {detail}", "Correct the rule") from error
        if reason is None:
            return True
        edit.abandon(layer)
        fact.declined[reason] += 1
        return False

    def _apply(self, candidate: _Candidate, root: Layer, registers: Registers, edit: Edit) -> str | None:
        """Runs the rule's code and carries out what it returns. Gives the reason if it declines."""
        way, network = candidate.way, self.network
        matcher = way.matcher
        with network.appending_before(root):
            if way.check is not None:
                verdict = way.check(registers)
                if verdict is not None and not verdict:
                    return "match returned False" if matcher is None else "check returned False"
                candidate.fact.matched += matcher is None
            result = way.rewrite(registers)
        if result is None or result is False:
            return "rewrite returned None"
        if matcher is None:
            candidate.fact.matched += way.check is None
            roots, matched, output = [root], {root: None}, 0
        else:
            roots, matched, output = (
                [registers[slot] for slot in matcher.roots],
                matcher.layers(registers),
                matcher.output,
            )
        edit.collect(root)
        try:
            pairs = pairs_of(result, roots, output)
        except TypeError as error:
            raise _broken(way, root, str(error), "Return a Tensor, a tuple, a dictionary or None") from None
        self._check_types(way, root, pairs)
        replaced = {old.parent: None for old, _ in pairs if old.parent is not None}
        matched.update(replaced)
        if matcher is not None and matcher.policies:
            _check_returns(way, root, registers, replaced, matched)
        put_in_order(edit, pairs, self._writers)
        self._check_effects(way, replaced, matched, edit.added)
        self._commit(candidate, root, edit, pairs, replaced, matched)
        if matcher is not None and matcher.policies:
            _copy_escapes(matcher, registers, edit)
        return None

    def _commit(
        self, candidate: _Candidate, root: Layer, edit: Edit, pairs: Sequence[Pair],
        replaced: Mapping[Layer, None], matched: Mapping[Layer, None],
    ) -> None:  # fmt: skip
        label = candidate.way.rule.label
        names = tuple([layer.name for layer in matched])
        edit.sign(label, names)
        erased = []
        for pair in pairs:
            edit.replace((pair,))
            if len(pairs) > 1 and pair[0].parent is not None:  # a root that is gone need not be given its new inputs
                erased += edit.erase_unused(replaced, (pair[0].parent,))
        if candidate.way.rule.source.changes_shape or candidate.way.rule.source.changes_dtype:
            edit.retype(pairs)
        erased += edit.erase_unused(replaced, matched)
        self._journal.append(edit)
        candidate.fact.rewritten += 1
        added = tuple([layer.name for layer in edit.added])
        gone = tuple([layer.name for layer in erased])
        self.report.applications.append(Application(label, root.name, root.module_path, names, added, gone))
        self._tell(edit, pairs, erased)

    def _check_types(self, way: Way, root: Layer, pairs: Sequence[Pair]) -> None:
        rule = way.rule.source
        for old, new in pairs:
            if new.network is not self.network or (new.parent is not None and new.parent.is_removed):
                raise _broken(way, root, f"returned {new.name}, which is not in this network")
            if (new.shape != old.shape and not rule.changes_shape) or (
                new.dtype != old.dtype and not rule.changes_dtype
            ):
                fix = "Cast or reshape the replacement, or declare changes_dtype or changes_shape on the rule"
                raise _broken(way, root, f"returned {new!r} for {old!r}", fix)

    def _check_effects(
        self, way: Way, replaced: Mapping[Layer, None], matched: Mapping[Layer, None], added: Sequence[Layer]
    ) -> None:
        """Effects are barriers: none is removed, and no read of a tensor moves over a write to it."""
        for layer in replaced:
            if layer.has_effects and not way.rule.source.removes_effects and not _covers(added, layer):
                raise MatchFailure(f"it would remove the effect of {layer.name}")
        if not self._writers:
            return
        earliest = min(layer.order for layer in matched)
        for layer in added:
            for tensor in layer._inputs:
                for writer in self._writers.get(tensor, ()):
                    if not writer.is_removed and writer not in matched and earliest < writer.order < layer.order:
                        raise MatchFailure(f"it would read {tensor.name} after {writer.name} wrote to it")

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
        edit.replace(list(zip(layer.outputs, copy.outputs, strict=True)))
        edit.erase_unused((), [layer])


def _covers(added: Sequence[Layer], old: Layer) -> bool:
    """The new layers have the effects of the old one: they write what it wrote, and one draws if it drew."""
    known = signature(old.op)
    written = {tensor for place in known.written for tensor in tensors_in(old.args[place])}
    draws = known.random
    for layer in added:
        new = signature(layer.op)
        written -= {tensor for place in new.written for tensor in tensors_in(layer.args[place])}
        draws = draws and not new.random
    return not written and not draws
