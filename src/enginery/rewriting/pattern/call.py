"""A pattern, and what PyTorch over patterns makes: a call whose arguments are patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

from enginery.errors import UsageError
from enginery.network.functions import resolve
from enginery.network.layer import Layer
from enginery.network.methods import TensorMethods
from enginery.network.operator import Operator, operator_name
from enginery.network.tensor import Tensor
from enginery.rewriting.matcher import Build, Matcher, Next, Registers, Scope, Step
from enginery.rewriting.traits import COMMUTATIVE

ESCAPES = ("keep", "forbid", "clone", "return")
"""What becomes of an inner layer of a match that others read too: it stays for them; the match fails; they get a copy
of their own right before they need it; the rule returns a replacement for it as well."""


class Pattern(TensorMethods):
    """A value. Operators, torch functions and tensor methods over it make larger patterns."""

    name: Any = None
    """what it is captured as, a str; None: not at all"""
    users: int | None = None
    is_call = False
    is_plain = False
    """it stands for an argument that is no tensor"""
    is_rest = False
    """in a list, it stands for all that the others leave"""

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Call:
        return Call(function, *args, **(kwargs or {}))

    def __iter__(self) -> Iterator[Pattern]:
        raise UsageError("a pattern cannot be unpacked", "Index the outputs that the rule needs: call[0], call[1]")

    def __bool__(self) -> bool:
        raise UsageError("a pattern is neither true nor false", "Test values in the rule's `check`")

    def match(self, layer: Layer) -> dict[str, Any] | None:
        """The captures by name if this pattern matches with `layer` as its root, else None."""
        matcher = self.__dict__.get("_matcher")
        if matcher is None:
            matcher = self._matcher = Matcher((self,))
        return matcher.captures(layer)

    # What the compiler asks (see matcher.Node)

    def plan(self, scope: Scope) -> Build:
        raise NotImplementedError

    def children(self) -> Sequence[Pattern]:
        return ()

    def root_ops(self) -> frozenset[Operator] | None:
        """The operators that may stand at the root; None: any; empty: this cannot be a root."""
        return frozenset()

    def root_output(self) -> int:
        return 0

    def bound_source(self, scope: Scope) -> Callable[[Registers], Tensor] | None:
        """Where to read the value of this node if it is bound already."""
        return None

    def height(self) -> int:
        return max((child.height() for child in self.children()), default=0) + self.is_call

    def weight(self) -> int:
        """How much it narrows a search: calls are tried first."""
        return 2 if self.is_call else max((child.weight() for child in self.children()), default=0)


class Call(Pattern):
    """A call of an operator. As a value it is its only output, or the first; `call[i]` is another."""

    is_call = True
    escape = "keep"
    distinct = True

    def __init__(self, function: Callable, *args: Any, **kwargs: Any) -> None:
        """`function`: what stands for one operator in torch. `...` as the last of `args`: the rest may be anything."""
        self.op, arguments = resolve(function, args, kwargs)
        self.arguments = tuple(pattern_of(argument) for argument in arguments)

    def bind(
        self, name: str | None = None, *, users: int | None = None, escape: str = "keep", distinct: bool = True
    ) -> Self:
        """Names the layer of this call and says what must hold for it. `escape`: see ESCAPES.

        `distinct=False` lets it be the same layer as another call of the pattern.
        """
        if escape not in ESCAPES:
            raise UsageError(f"no policy for escaping values is named {escape!r}", f"Use one of: {', '.join(ESCAPES)}")
        self.name, self.users, self.escape, self.distinct = name, users, escape, distinct
        return self

    def __getitem__(self, index: Any) -> Pattern:
        if isinstance(index, int) and self.has_many_outputs:
            return Output(self, index)
        return super().__getitem__(index)

    @property
    def has_many_outputs(self) -> bool:
        returns = self.op._schema.returns
        return len(returns) != 1 or str(returns[0].type) != "Tensor"

    def children(self) -> Sequence[Pattern]:
        return self.arguments

    def root_ops(self) -> frozenset[Operator] | None:
        return frozenset({self.op})

    def bound_source(self, scope: Scope) -> Callable[[Registers], Tensor] | None:
        return self.output_source(scope, 0)

    def output_source(self, scope: Scope, index: int) -> Callable[[Registers], Tensor] | None:
        slot = scope.nodes.get(id(self))
        return None if slot is None else lambda registers: registers[slot].outputs[index]

    def plan(self, scope: Scope) -> Build:
        return self.plan_output(scope, 0)

    def accepts(self) -> Callable[[Layer], bool]:
        """The test of a layer before its arguments are looked at."""
        op = self.op
        return lambda layer: layer.op is op

    def title(self) -> str:
        return operator_name(self.op)

    def plan_output(self, scope: Scope, index: int) -> Build:
        if id(self) in scope.nodes:
            return partial(_same_layer, scope.nodes[id(self)], index)
        rivals = scope.rivals(self.root_ops(), self.distinct)
        slot = scope.place(self)
        scope.calls.append((slot, self.root_ops(), self.distinct))
        scope.policies.append((slot, self.escape))
        if self.name is not None:
            scope.names[self.name] = slot
            scope.bound.add(self.name)
        inside = self.plan_arguments(scope, slot)
        users, accepts = self.users, self.accepts()

        def build(then: Next) -> Step:
            body = inside(then)

            def step(value: Any, registers: Registers) -> bool:
                if value.__class__ is not Tensor:
                    return False
                layer = value.parent
                if layer is None or not accepts(layer) or value.index != index:
                    return False
                if users is not None and users_of(value) != users:
                    return False
                for rival in rivals:
                    if registers[rival] is layer:
                        return False
                registers[slot] = layer
                return body(registers)

            return step

        return build

    def plan_arguments(self, scope: Scope, slot: int) -> Callable[[Next], Next]:
        """Literals first, then the arguments that narrow the search most."""
        literals = tuple((i, item.value) for i, item in enumerate(self.arguments) if isinstance(item, Literal))
        rest = [i for i, item in enumerate(self.arguments) if not isinstance(item, (Literal, Anything))]
        rest.sort(key=lambda i: -self.arguments[i].weight())
        swapped = self.is_commutative
        if swapped:
            rest = [i for i in rest if i in (0, 1)] + [i for i in rest if i not in (0, 1)]
        plans = [(i, self.arguments[i].plan(scope)) for i in rest]
        pending = scope.new_slot() if swapped else 0

        def build(then: Next) -> Next:
            for i, plan in reversed(plans[2 * swapped :]):
                then = _argument(slot, i, plan(then))
            if swapped:
                second = _register(pending, plans[1][1](then))
                then = _either_order(slot, pending, plans[0][0], plans[0][1](second))
            return _literals(slot, literals, then) if literals else then

        return build

    @property
    def is_commutative(self) -> bool:
        """Both orders of the first two arguments are to be tried."""
        return self.op in COMMUTATIVE and not any(item.is_plain for item in self.arguments[:2])


class Output(Pattern):
    """One of several outputs of a call."""

    def __init__(self, call: Call, index: int) -> None:
        self.call, self.index = call, index

    def children(self) -> Sequence[Pattern]:
        return (self.call,)

    def root_ops(self) -> frozenset[Operator] | None:
        return self.call.root_ops()

    def root_output(self) -> int:
        return self.index

    def bound_source(self, scope: Scope) -> Callable[[Registers], Tensor] | None:
        return self.call.output_source(scope, self.index)

    def plan(self, scope: Scope) -> Build:
        scope.pass_on(self, self.call)
        return self.call.plan_output(scope, self.index)


class Items(Pattern):
    """A list argument with patterns in it; at most one of them is `Vars`."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = tuple(pattern_of(item) for item in items)
        rests = [i for i, item in enumerate(self.items) if item.is_rest]
        if len(rests) > 1:
            raise UsageError("a list pattern has room for one Vars only")
        self.rest = rests[0] if rests else None

    def children(self) -> Sequence[Pattern]:
        return self.items

    def spread(self, value: Any) -> tuple | None:
        """One value per item, the rest as a tuple; None if the lengths do not fit."""
        if value.__class__ is not tuple:
            return None
        rest = self.rest
        if rest is None or len(value) < len(self.items) - 1:
            return value if len(value) == len(self.items) and rest is None else None
        tail = len(value) - (len(self.items) - rest - 1)
        return (*value[:rest], value[rest:tail], *value[tail:])

    def plan(self, scope: Scope) -> Build:
        plans = [item.plan(scope) for item in self.items]
        count, slot = len(plans), scope.new_slot()

        def part(index: int, step: Step) -> Next:
            return lambda registers: step(registers[slot][index], registers)

        def build(then: Next) -> Step:
            for index in reversed(range(count)):
                then = part(index, plans[index](then))

            def step(value: Any, registers: Registers) -> bool:
                registers[slot] = self.spread(value)
                return registers[slot] is not None and then(registers)

            return step

        return build


class Literal(Pattern):
    """Exactly this value."""

    is_plain = True

    def __init__(self, value: Any) -> None:
        self.value = value

    def plan(self, scope: Scope) -> Build:
        wanted = self.value
        return lambda then: lambda value, registers: value == wanted and then(registers)


class Anything(Pattern):
    """`...` in the place of one argument."""

    def plan(self, scope: Scope) -> Build:
        return lambda then: lambda value, registers: then(registers)


def pattern_of(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if value is ...:
        return Anything()
    if isinstance(value, (list, tuple)):
        items = [pattern_of(item) for item in value]
        return Items(items) if not all(isinstance(item, Literal) for item in items) else Literal(_frozen(items))
    return Literal(value)


def _frozen(items: list[Any]) -> tuple:
    return tuple(item.value for item in items)


def names_in(pattern: Pattern) -> set[str]:
    own = {pattern.name} if pattern.name is not None else set()
    return own.union(*(names_in(child) for child in pattern.children()))


def users_of(value: Tensor) -> int:
    return len(value._uses) + bool(value.output_names)


# Steps


def _same_layer(slot: int, index: int, then: Next) -> Step:
    def step(value: Any, registers: Registers) -> bool:
        if value.__class__ is not Tensor or value.parent is not registers[slot] or value.index != index:
            return False
        return then(registers)

    return step


def _argument(slot: int, index: int, step: Step) -> Next:
    return lambda registers: step(registers[slot]._args[index], registers)


def _register(slot: int, step: Step) -> Next:
    return lambda registers: step(registers[slot], registers)


def _literals(slot: int, literals: tuple, then: Next) -> Next:
    def body(registers: Registers) -> bool:
        args = registers[slot]._args
        for index, wanted in literals:
            if args[index] != wanted:
                return False
        return then(registers)

    return body


def _either_order(slot: int, pending: int, first: int, step: Step) -> Next:
    """The step for the argument that is tried first; the other argument waits in a register."""
    second = 1 - first

    def body(registers: Registers) -> bool:
        args = registers[slot]._args
        one, other = args[first], args[second]
        registers[pending] = other
        if step(one, registers):
            return True
        if one is other:
            return False
        registers[pending] = one
        return step(other, registers)

    return body
