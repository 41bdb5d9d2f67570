"""One run of a manager over one network: the worklist, and what happens to what a rule returns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from time import perf_counter
from traceback import walk_tb
from typing import Any, NoReturn

from enginery.errors import RULE_ERRORS, EngineryError, RewriteError, RewriteLimitError, in_one_line
from enginery.network.collection import paused_collection
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.binding import BoundRule, Way
from enginery.rewriting.blocks import Block
from enginery.rewriting.edit import Edit, Pair
from enginery.rewriting.effects import Effects
from enginery.rewriting.matcher import REASON, Registers, escapes
from enginery.rewriting.memory import Answer, Memory
from enginery.rewriting.ordering import put_in_order
from enginery.rewriting.proposal import Candidate, Proposal, consult, match, propose
from enginery.rewriting.recording import Recording
from enginery.rewriting.replacement import pairs_of
from enginery.rewriting.report import Application, Report, RuleReport
from enginery.rewriting.rule import MatchFailure
from enginery.rewriting.view import View


class Run:
    """Not reusable. After `run`, `undo` takes all of it back."""

    def __init__(
        self, network: Network, rules: Sequence[BoundRule], args: Mapping[str, Any], *, limit: int,
        stop_after: int | None = None, without: Collection[str] = (), remember: bool | None = None,
    ) -> None:  # fmt: skip
        """`limit` applications are an error; after `stop_after` of them the run ends. Rules in `without` stay
        out of it. `remember`: what pure rules said is repeated in equal blocks; None: if that is likely to pay.
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
        self._remember = remember
        self._memory: Memory | None = None
        self._pure: set[int] = set()
        """operators all of whose rules are pure"""

    def run(self) -> Report:
        start = perf_counter()
        network = self.network
        place = network._cursor, network._module_path
        with paused_collection():
            try:
                for layer in network:
                    self._enter(layer)
                if self._pays_to_remember():
                    self._memory = Memory(network)
                self._drain()
            finally:
                network._cursor, network._module_path = place
        if self._memory is not None:
            self._memory.count()
        self.report.layers_after = len(network)
        self.report.milliseconds = (perf_counter() - start) * 1e3
        return self.report

    def undo(self) -> None:
        while self._journal:
            self._journal.pop().undo()

    def _pays_to_remember(self) -> bool:
        """Looking for equal blocks costs as much as asking a few rules at every layer."""
        if self._remember is None:
            offers = sum(len(self._by_op[id(layer.op)]) for layer in self._queue if id(layer.op) in self._pure)
            return offers > 2 * len(self.network)
        return self._remember

    # The worklist

    def _drain(self) -> None:
        queue, queued, journal = self._queue, self._queued, self._journal
        self._clock = perf_counter()
        while queue:
            layer = queue.popleft()
            queued.discard(layer)
            if layer.is_removed:
                continue
            self._offer(layer)
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
        if found and all(candidate.way.rule.source.pure for candidate in found):
            self._pure.add(id(layer.op))
        return found

    def _tell(self, edit: Edit, pairs: Sequence[Pair]) -> None:
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
        for layer in (*edit.added, *edit.erased):
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

    def _offer(self, layer: Layer) -> None:
        """Asks the rules in turn until one of them changes the network."""
        self.network._cursor, self.network._module_path = layer, layer.module_path
        candidates, edit = self._by_op[id(layer.op)], Edit(self.network, layer)
        memory = self._memory if id(layer.op) in self._pure else None
        block = memory.block_of(layer) if memory is not None else None
        if memory is None or block is None:
            self._ask(candidates, edit)
            return
        recalled = memory.recall(layer, block)
        if recalled is not None:
            self._offer_recalled(candidates, edit, *recalled)
        else:
            self._offer_recorded(candidates, edit, memory, block)

    def _ask(self, candidates: Sequence[Candidate], edit: Edit) -> None:
        for candidate in candidates:
            try:
                fits, registers = match(candidate, edit.root)
                proposal = consult(candidate, registers, self.network) if fits else None
            except RULE_ERRORS as error:
                self._fail(candidate, edit, error)
            if proposal is None:
                candidate.fact.tried += 1
                if registers[REASON] is not None:
                    candidate.fact.declined[registers[REASON]] += 1
                self._take_time(candidate)
            elif self._settle(candidate, edit, proposal):
                return

    def _offer_recorded(self, candidates: Sequence[Candidate], edit: Edit, memory: Memory, block: Block) -> None:
        recording, answer = memory.recording(edit.root, block), Answer()
        if recording is None:
            self._ask(candidates, edit)
            return
        for i, candidate in enumerate(candidates):
            proposal = self._propose(candidate, edit, recording)
            answer.add(candidate, proposal, recording)
            if proposal.result is not None or i + 1 == len(candidates):
                memory.learn(edit, block, recording, answer)
                if not self._settle(candidate, edit, proposal):
                    edit.answer = None
                    self._ask(candidates[i + 1 :], edit)
                return
            self._settle(candidate, edit, proposal)

    def _offer_recalled(self, candidates: Sequence[Candidate], edit: Edit, answer: Answer, view: View) -> None:
        proposal = answer.repeat(view, self.network)
        if proposal is None or answer.candidate is None:
            self._take_time(candidates[0])
            return
        edit.answer = answer
        if self._settle(answer.candidate, edit, proposal):
            answer.candidate.fact.replayed += 1
            return
        edit.answer = None
        self._ask(candidates[candidates.index(answer.candidate) + 1 :], edit)

    def _propose(self, candidate: Candidate, edit: Edit, recording: Recording) -> Proposal:
        try:
            with recording:
                return propose(candidate, edit.root, self.network)
        except RULE_ERRORS as error:
            self._fail(candidate, edit, error)

    def _settle(self, candidate: Candidate, edit: Edit, proposal: Proposal) -> bool:
        """Carries out what a rule proposes; whether that changed the network."""
        fact = candidate.fact
        matched, reason, registers, result = proposal
        fact.tried += 1
        fact.matched += matched
        try:
            if result is not None:
                edit.collect()
                self._carry_out(candidate, edit, registers, result)
                self._take_time(candidate)
                return True
        except MatchFailure as failure:
            reason = str(failure)
        except RULE_ERRORS as error:
            self._fail(candidate, edit, error)
        edit.abandon()
        if reason is not None:
            fact.declined[reason] += 1
        self._take_time(candidate)
        return False

    def _take_time(self, candidate: Candidate) -> None:
        now = perf_counter()
        candidate.fact.milliseconds += (now - self._clock) * 1e3
        self._clock = now

    def _fail(self, candidate: Candidate, edit: Edit, error: BaseException) -> NoReturn:
        """Raises the error of a rule, with the network as before the rule."""
        edit.abandon()
        if isinstance(error, RewriteError):
            raise error
        fix = error.fix if isinstance(error, EngineryError) else ""
        line = _line_of(error, candidate.way.rule.location)
        raise _broken(
            candidate.way, edit.root, f"raised {in_one_line(error)}", fix or "Correct the rule", line
        ) from error

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
        if self._memory is not None:
            self._memory.note(edit, _changes_types(way, pairs))

    def _commit(
        self, candidate: Candidate, edit: Edit, pairs: Sequence[Pair], replaced: Mapping[Layer, None],
        matched: Mapping[Layer, None],
    ) -> None:  # fmt: skip
        rule, root = candidate.way.rule, edit.root
        names = tuple([layer.name for layer in matched])
        edit.sign(rule.label, names)
        for old, new in pairs:
            edit.replace(old, new)
            if len(pairs) > 1 and old.parent is not None:  # a root that is gone need not be given its new inputs
                edit.erase_unused(replaced, (old.parent,))
        retyped = rule.source.changes_shape or rule.source.changes_dtype
        if retyped:
            edit.retype(pairs)
        edit.erase_unused(replaced, matched)
        self._journal.append(edit)
        candidate.fact.rewritten += 1
        added = tuple([layer.name for layer in edit.added])
        gone = tuple([layer.name for layer in edit.erased])
        self.report.applications.append(Application(rule.label, root.name, root.module_path, names, added, gone))
        self._tell(edit, pairs)

    def _limit_error(self, layer: Layer) -> RewriteLimitError:
        recent = self.report.applications[len(self.report.applications) // 2 :]
        counts = Counter(application.rule for application in recent).most_common()
        self.undo()
        text = ", ".join(f"{rule} {count} times" for rule, count in counts)
        place = self.report[counts[0][0]].location
        return RewriteLimitError(
            f"more than {self.limit} rewrites, the last ones by {text} (now at layer {layer.name}; {place})",
            "Make the rule decline its own output, or raise limit=",
            rule=counts[0][0],
            layer=layer.name,
        )


def _broken(way: Way, layer: Layer, what: str, fix: str = "", line: str = "") -> RewriteError:
    label = way.rule.label
    cause = f"rule {label} {what} (at layer {layer.name}; {line or way.rule.location})"
    return RewriteError(cause, fix, rule=label, layer=layer.name)


def _line_of(error: BaseException, location: str) -> str:
    """The last line of the rule's file on the way to an error."""
    file, line = location.rpartition(":")[0], location
    for frame, number in walk_tb(error.__traceback__):
        if frame.f_code.co_filename == file:
            line = f"{file}:{number}"
    return line


def _check_types(way: Way, root: Layer, pairs: Sequence[Pair]) -> None:
    rule, network = way.rule.source, root.network
    for old, new in pairs:
        if new.network is not network or (new.parent is not None and new.parent.is_removed):
            raise _broken(way, root, f"returned {new.name}, which is not in this network")
        if (new.shape != old.shape and not rule.changes_shape) or (new.dtype != old.dtype and not rule.changes_dtype):
            fix = "Cast or reshape the replacement, or declare changes_dtype or changes_shape on the rule"
            raise _broken(way, root, f"returned {new!r} for {old!r}", fix)


def _changes_types(way: Way, pairs: Sequence[Pair]) -> bool:
    rule = way.rule.source
    return rule.changes_shape or rule.changes_dtype or any(old.is_constant != new.is_constant for old, new in pairs)


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
        edit.moved.append(copy)
        for old, new in zip(layer.outputs, copy.outputs, strict=True):
            edit.replace(old, new)
        edit.erase_unused((), [layer])
