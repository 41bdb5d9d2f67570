"""Why a rule did not match: the nearest miss, in words.

`Matcher` answers yes or no, as fast as it can. Here the same patterns are walked step by step, every way is tried, and
what ended each of them is remembered with how far it had come. To find *which* layer came nearest costs one run of the
matcher per candidate: its registers show how many parts had matched. Where all of them do, the rule's own code is
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.operator import Operator, operator_name, signature
from enginery.network.tensor import Tensor
from enginery.rewriting.binding import BoundRule, Way, bind
from enginery.rewriting.matcher import ARGS, NETWORK, Constraint, Matcher, Registers, escapes
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
    names_in,
    users_of,
)
from enginery.rewriting.rule import MatchFailure, PatternRewriter
from enginery.rewriting.trial import decline


@dataclass(frozen=True)
class Miss:
    """Where the deepest partial match of a rule ended. `matched` parts of the pattern had fitted before."""

    rule: str
    layer: str
    """name of the root at which it was tried; empty if there was none"""
    matched: int
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.rule}: nearest miss at {self.layer}: {self.reason}" if self.layer else f"{self.rule}: {self.reason}"
        )


def explain(network: Network, rule: PatternRewriter, *, label: str | None = None) -> Miss | None:
    """The nearest miss of a rule, or None if it would rewrite some layer. The network is as before afterwards."""
    bound = bind(label or type(rule).__name__, rule)
    return nearest_miss(network, bound)


def nearest_miss(network: Network, bound: BoundRule) -> Miss | None:
    """A layer at which pattern and `check` fit and only the rule's code declines is nearer than any other."""
    declined: Miss | None = None
    best: tuple[int, Layer, Matcher] | None = None
    for way in bound.ways:
        matcher = way.matcher
        for layer in network:
            if not way.accepts(layer):
                continue
            matched, registers = matcher.attempt(layer) if matcher is not None else (True, [layer, None, None, None])
            if matched:
                reason = refusal(network, way, registers) or decline(network, way, layer, registers)
                if reason is None:
                    return None
                declined = declined or Miss(bound.label, layer.name, len(registers), reason)
            elif matcher is not None:
                written = len(registers) - registers.count(None)
                if best is None or written > best[0]:
                    best = written, layer, matcher
    if declined is not None:
        return declined
    if best is None:
        return Miss(bound.label, "", 0, f"the network has no {_wanted(bound)}")
    _, layer, matcher = best
    depth, reason = why(matcher.sources, layer, matcher.constraints) or (0, "it matches")
    return Miss(bound.label, layer.name, depth, reason)


def _wanted(bound: BoundRule) -> str:
    """The roots that a rule looks for, in words."""
    wanted = [op for way in bound.ways if way.matcher is not None for op in way.matcher.ops or ()] or bound.roots or ()
    names = {operator_name(op) if isinstance(op, Operator) else str(op) for op in wanted}
    return " and no ".join(sorted(names)) or "layer"


def refusal(network: Network, way: Way, registers: Registers) -> str | None:
    """Why `check` refuses a match."""
    if way.check is None:
        return None
    registers[NETWORK], registers[ARGS] = network, way.rule.args
    try:
        with network.guarded(append=False):
            verdict = way.check(registers)
    except MatchFailure as failure:
        return str(failure) or "check declined"
    return None if verdict is None or verdict else "check returned False"


def why(roots: Sequence[Pattern], layer: Layer, constraints: Sequence[Constraint] = ()) -> tuple[int, str] | None:
    """How many parts had matched where the deepest attempt ended, and why it ended; None if the pattern matches."""
    walk = _Walk()
    first = roots[0]
    output = first.root_output()
    if output >= len(layer.outputs):
        return 0, f"{layer.name} has no output {output}"
    for names in walk.value(first, layer.outputs[output], {}):
        for further in walk.further(roots[1:], names):
            failed = next((c.words for c in constraints if not c.holds(*[further.get(name) for name in c.names])), None)
            failed = failed or _escape(roots, further)
            if failed is None:
                return None
            walk.miss(further, failed)
    return walk.depth, walk.reason


def _escape(roots: Sequence[Pattern], names: Names) -> str | None:
    """The first inner layer with users outside the match, where its pattern forbids them."""
    matched = {value for key, value in names.items() if key.__class__ is int}
    tops = {id(_call(root)) for root in roots}
    for node in _calls_in(roots):
        layer: Layer | None = names.get(id(node))
        if layer is not None and node.escape == "forbid" and id(node) not in tops and escapes(layer, matched):
            return f"{layer.name} is read outside the match as well"
    return None


def _calls_in(nodes: Sequence[Pattern]) -> Iterator[Call]:
    for node in nodes:
        if isinstance(node, Call):
            yield node
        yield from _calls_in(node.children())


Names = dict[Any, Any]
"""captures by name, and the layer of each call by the identity of its pattern"""


@dataclass
class _Walk:
    """A matcher that yields every way to match, and keeps the reason of the deepest failure."""

    depth: int = -1
    reason: str = ""

    def miss(self, names: Names, reason: str) -> None:
        if len(names) > self.depth:
            self.depth, self.reason = len(names), reason

    def value(self, node: Pattern, value: Any, names: Names) -> Iterator[Names]:
        """All extensions of `names` with which the pattern stands for the value."""
        yield from _STEPS[type(node)](self, node, value, names)

    def each(self, nodes: Sequence[Pattern], values: Sequence[Any], names: Names) -> Iterator[Names]:
        if not nodes:
            yield names
            return
        for found in self.value(nodes[0], values[0], names):
            yield from self.each(nodes[1:], values[1:], found)

    def further(self, roots: Sequence[Pattern], names: Names) -> Iterator[Names]:
        """Ways to find the further roots among the users of what is bound."""
        if not roots:
            yield names
            return
        root = roots[0]
        if id(_call(root)) in names:
            yield from self.further(roots[1:], names)
            return
        bound = [value for value in names.values() if isinstance(value, (Tensor, Layer))]
        reached = _downstream(bound, root.height())
        for layer in reached:
            if root.root_output() < len(layer.outputs):
                for found in self.value(root, layer.outputs[root.root_output()], names):
                    yield from self.further(roots[1:], found)
        if not reached:
            self.miss(names, "nothing else uses the shared value")


def _call(node: Pattern) -> Pattern:
    return node.call if isinstance(node, Output) else node


def _downstream(values: Sequence[Any], levels: int) -> list[Layer]:
    found: dict[Layer, None] = {}
    frontier = [output for value in values for output in ([value] if isinstance(value, Tensor) else value.outputs)]
    for _ in range(levels):
        users = {user: None for value in frontier for user in value.users}
        found.update(users)
        frontier = [output for user in users for output in user.outputs]
    return sorted(found, key=lambda layer: layer.order)


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    origin = operator_name(value.parent.op) if value.parent else "constant" if value.is_constant else "input"
    return f"{value.name} ({origin})"


def _bind(walk: _Walk, name: str | None, value: Any, names: Names, same: Callable[[Any, Any], bool]) -> Iterator[Names]:
    if name is None:
        yield names
    elif name not in names or names[name] is None:
        yield {**names, name: value}
    elif same(names[name], value):
        yield names
    else:
        walk.miss(names, f"{name} is {_show(names[name])} already, not {_show(value)}")


def _var(walk: _Walk, node: Var, value: Any, names: Names) -> Iterator[Names]:
    if not isinstance(value, Tensor):
        walk.miss(names, f"{node.name or 'a value'} is {value!r}, not a tensor")
        return
    for test, words in node.tests:
        if not test(value):
            walk.miss(names, f"{node.name or 'a value'}, {_show(value)}, {words}")
            return
    if node.distinct and any(other is value and name != node.name for name, other in names.items()):
        walk.miss(names, "two variables are one value")
        return
    yield from _bind(walk, node.name, value, names, lambda a, b: a is b)


def _scalar(walk: _Walk, node: Scalar, value: Any, names: Names) -> Iterator[Names]:
    if value is None or isinstance(value, Tensor):
        walk.miss(names, f"{node.name} is {_show(value)}, not a number or a list")
    elif node.predicate is not None and not node.predicate(value):
        walk.miss(names, f"{node.name} = {value!r} is refused by its predicate")
    else:
        yield from _bind(walk, node.name, value, names, lambda a, b: a == b)


def _vars(walk: _Walk, node: Vars, value: Any, names: Names) -> Iterator[Names]:
    if not isinstance(value, tuple) or len(value) < node.at_least or not all(isinstance(v, Tensor) for v in value):
        walk.miss(names, f"{node.name} is not a list of at least {node.at_least} tensors")
    elif node.constant and not all(item.is_constant for item in value):
        walk.miss(names, f"not all of {node.name} are known at build time")
    else:
        yield from _bind(walk, node.name, list(value), names, lambda a, b: a == b)


def _items(walk: _Walk, node: Items, value: Any, names: Names) -> Iterator[Names]:
    values = node.spread(value)
    if values is None:
        walk.miss(names, f"a list of {len(node.items)} was expected, not {value!r}")
    else:
        yield from walk.each(node.items, values, names)


def _literal(walk: _Walk, node: Literal, value: Any, names: Names) -> Iterator[Names]:
    if value.__class__ is not Tensor and value == node.value:
        yield names
    else:
        walk.miss(names, f"an argument is {_show(value)}, not {node.value!r}")


def _anything(walk: _Walk, node: Anything, value: Any, names: Names) -> Iterator[Names]:
    yield names


def _optional(walk: _Walk, node: Optional, value: Any, names: Names) -> Iterator[Names]:
    if value is not None:
        yield from walk.value(node.pattern, value, names)
    else:
        yield {**dict.fromkeys(names_in(node.pattern)), **names}


def _one_of(walk: _Walk, node: OneOf, value: Any, names: Names) -> Iterator[Names]:
    for pattern in node.patterns:
        yield from walk.value(pattern, value, names)


def _through(walk: _Walk, node: Through, value: Any, names: Names) -> Iterator[Names]:
    if not isinstance(value, Tensor):
        yield from walk.value(node.pattern, value, names)
        return
    for under in reversed(list(node.layers_under(value))):
        yield from walk.value(node.pattern, under, names)


def _call_step(walk: _Walk, node: Call, value: Any, names: Names, index: int = 0) -> Iterator[Names]:
    layer = value.parent if isinstance(value, Tensor) else None
    if layer is None or value.index != index or not node.accepts()(layer):
        walk.miss(names, f"{_show(value)} is not {node.title()}{f'[{index}]' if index else ''}")
        return
    known = names.get(id(node))
    if known is not None:
        if known is layer:
            yield names
        else:
            walk.miss(names, f"{layer.name} is not {known.name}, which the pattern used before")
        return
    if node.users is not None and users_of(value) != node.users:
        walk.miss(names, f"{layer.name} has {users_of(value)} users, not {node.users}")
        return
    if node.distinct and any(key.__class__ is int and other is layer for key, other in names.items()):
        walk.miss(names, f"{layer.name} would stand for two calls of the pattern")
        return
    found = {**names, id(node): layer}
    if node.name is not None:
        found[node.name] = layer
    yield from _arguments(walk, node, layer, found)


def _arguments(walk: _Walk, node: Call, layer: Layer, names: Names) -> Iterator[Names]:
    if isinstance(node, AnyOp):
        inputs = layer.inputs
        if len(inputs) < len(node.arguments) or (len(inputs) > len(node.arguments) and not node.open):
            walk.miss(names, f"{layer.name} has {len(inputs)} inputs, not {len(node.arguments)}")
        else:
            yield from walk.each(node.arguments, inputs, names)
        return
    titles = signature(layer.op).names
    literals = [i for i, item in enumerate(node.arguments) if isinstance(item, Literal)]
    for i in literals:
        wanted = node.arguments[i].value
        if layer.args[i].__class__ is Tensor or layer.args[i] != wanted:
            walk.miss(names, f"argument {titles[i]} of {layer.name} is {_show(layer.args[i])}, not {wanted!r}")
            return
    rest = [i for i in range(len(node.arguments)) if i not in literals]
    orders = [rest]
    if node.is_commutative:
        orders.append([{0: 1, 1: 0}.get(i, i) for i in rest])
    for order in orders:
        yield from walk.each([node.arguments[i] for i in rest], [layer.args[i] for i in order], names)


def _output(walk: _Walk, node: Output, value: Any, names: Names) -> Iterator[Names]:
    yield from _call_step(walk, node.call, value, names, node.index)


def _chain(walk: _Walk, node: Chain, value: Any, names: Names) -> Iterator[Names]:
    layer = value.parent if isinstance(value, Tensor) else None
    if layer is None or layer.op is not node.op:
        walk.miss(names, f"{_show(value)} is not {operator_name(node.op)}")
        return
    leaves, _ = node.leaves(layer)
    if len(leaves) < len(node.operands) or (len(leaves) > len(node.operands) and node.rest is None):
        walk.miss(names, f"the chain at {layer.name} has {len(leaves)} operands, not {len(node.operands)}")
        return
    yield from _assign(walk, node, node.operands, leaves, {**names, id(node): layer})


def _assign(walk: _Walk, node: Chain, operands: Sequence[Pattern], leaves: list[Any], names: Names) -> Iterator[Names]:
    if not operands:
        yield {**names, node.rest: leaves} if node.rest is not None else names
        return
    for i, leaf in enumerate(leaves):
        for found in walk.value(operands[0], leaf, names):
            yield from _assign(walk, node, operands[1:], leaves[:i] + leaves[i + 1 :], found)


_STEPS: Mapping[type, Callable[..., Iterator[Names]]] = MappingProxyType(
    {
        Var: _var,
        Scalar: _scalar,
        Vars: _vars,
        Items: _items,
        Literal: _literal,
        Anything: _anything,
        Optional: _optional,
        OneOf: _one_of,
        Through: _through,
        Call: _call_step,
        AnyOp: _call_step,
        Output: _output,
        Chain: _chain,
    }
)
