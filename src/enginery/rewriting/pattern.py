"""Patterns: PyTorch over pattern values is a pattern.

    Var("x") * F.silu(Var("g"))                                  # operands in either order
    F.linear(Var("x"), Const("w"), Optional(Const("b")))         # with a bias or without: b is None then
    torch.ops.aten.rms_norm(Var("x"), ..., eps=Scalar("eps"))    # `...`: the rest may be anything
    torch.cat(Vars("parts"), dim=-1)                             # parts is the list
    OneOf(F.silu(Var("x")), F.gelu(Var("x")))                    # the first that matches

A pattern stands for one value of a network. It is built once, when a rule's class is defined, and compiled by
`matcher.py`. Functions that torch implements in C check their arguments before a pattern sees them: where they refuse
`...`, a `Scalar` or an `Optional`, write `Call(F.linear, Var("x"), Const("w"), ...)` or the operator itself,
`torch.ops.aten.linear(Var("x"), Const("w"), ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Number
from typing import Any, Self

import torch

from enginery.errors import UsageError
from enginery.network.functions import resolve
from enginery.network.layer import Layer
from enginery.network.methods import TensorMethods
from enginery.network.operator import Operator, operator_name
from enginery.network.tensor import Tensor
from enginery.rewriting.matcher import Build, Matcher, Next, Registers, Scope, Step
from enginery.rewriting.traits import COMMUTATIVE, TRANSPARENT

ESCAPES = ("keep", "forbid", "clone", "return")
"""What becomes of an inner layer of a match that others read too: it stays for them; the match fails; they get a copy
of their own right before they need it; the rule returns a replacement for it as well."""


class Pattern(TensorMethods):
    """A value. Operators, torch functions and tensor methods over it make larger patterns."""

    name: Any = None
    """what it is captured as, a str; None: not at all"""
    users: int | None = None
    is_call = False

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


class Var(Pattern):
    """Any tensor. The same name twice is the same tensor; a number never binds to it (that is `Scalar`)."""

    def __init__(
        self,
        name: str | None = None,
        *,
        users: int | None = None,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        rank: int | None = None,
        shape: tuple | None = None,
        where: Callable[[Tensor], bool] | None = None,
        distinct: bool = False,
        constant: bool | None = None,
    ) -> None:
        """`shape` may hold None for any size; `distinct` forbids that another variable is the same tensor."""
        self.name, self.users, self.distinct, self.constant, self.rank = name, users, distinct, constant, rank
        self.dtype = dtype[0] if isinstance(dtype, tuple) else dtype
        self.tests = _tensor_tests(users, dtype, rank, shape, where, constant)

    def bound_source(self, scope: Scope) -> Callable[[Registers], Tensor] | None:
        if self.name not in scope.bound:
            return None
        slot = scope.names[self.name]
        return lambda registers: registers[slot]

    def weight(self) -> int:
        return 1 if self.tests else 0

    def plan(self, scope: Scope) -> Build:
        tests, name = tuple(test for test, _ in self.tests), self.name
        if name is None:
            return lambda then: _test_only(tests, then)
        known, maybe = name in scope.bound, name in scope.maybe
        slot = scope.slot_of(name)
        scope.bound.add(name)
        if self.distinct:
            scope.separate.add(slot)
        if known:
            return lambda then: _same(slot, then)
        return lambda then: _bind_or_same(slot, tests, then) if maybe else _bind(slot, tests, then)


def Const(name: str | None = None, **options: Any) -> Var:
    """A tensor that is known at build time: a weight, or computed from weights alone."""
    return Var(name, constant=True, **options)


class Scalar(Pattern):
    """An argument that is no tensor: a number, a size, a list of sizes, a dtype. Never None."""

    argument_kind = Number

    def __init__(self, name: str, predicate: Callable[[Any], bool] | None = None) -> None:
        self.name, self.predicate = name, predicate

    def plan(self, scope: Scope) -> Build:
        known, slot, predicate = self.name in scope.bound, scope.slot_of(self.name), self.predicate
        scope.bound.add(self.name)

        def build(then: Next) -> Step:
            def step(value: Any, registers: Registers) -> bool:
                if value is None or value.__class__ is Tensor or (predicate is not None and not predicate(value)):
                    return False
                if known:
                    return registers[slot] == value and then(registers)
                registers[slot] = value
                return then(registers)

            return step

        return build


class Vars(Pattern):
    """A list of tensors, captured as a list; inside a list pattern, what is left of it."""

    def __init__(self, name: str, *, at_least: int = 0, constant: bool = False) -> None:
        self.name, self.at_least, self.constant = name, at_least, constant

    def plan(self, scope: Scope) -> Build:
        known, slot = self.name in scope.bound, scope.slot_of(self.name)
        scope.bound.add(self.name)

        def build(then: Next) -> Step:
            def step(value: Any, registers: Registers) -> bool:
                if value.__class__ is not tuple or len(value) < self.at_least:
                    return False
                for item in value:
                    if item.__class__ is not Tensor or (self.constant and not item.is_constant):
                        return False
                if known:
                    return registers[slot] == list(value) and then(registers)
                registers[slot] = list(value)
                return then(registers)

            return step

        return build


class Items(Pattern):
    """A list argument with patterns in it; at most one of them is `Vars`."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = tuple(pattern_of(item) for item in items)
        rests = [i for i, item in enumerate(self.items) if isinstance(item, Vars)]
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

    def __init__(self, value: Any) -> None:
        self.value = value

    def plan(self, scope: Scope) -> Build:
        wanted = self.value
        return lambda then: lambda value, registers: value == wanted and then(registers)


class Anything(Pattern):
    """`...` in the place of one argument."""

    def plan(self, scope: Scope) -> Build:
        return lambda then: lambda value, registers: then(registers)


class Optional(Pattern):
    """An operand that may be absent (None); what it would bind is None then."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern_of(pattern)

    def children(self) -> Sequence[Pattern]:
        return (self.pattern,)

    def plan(self, scope: Scope) -> Build:
        before, first = set(scope.bound), len(scope.calls)
        ((plan, _),) = scope.alternatives((self.pattern,), or_nothing=True)
        slots = (
            *(scope.names[name] for name in sorted(names_in(self.pattern) - before)),
            *(slot for slot, _, _ in scope.calls[first:]),
        )

        def build(then: Next) -> Step:
            present = plan(then)

            def step(value: Any, registers: Registers) -> bool:
                if value is not None:
                    return present(value, registers)
                for slot in slots:
                    registers[slot] = None
                return then(registers)

            return step

        return build


class OneOf(Pattern):
    """The first of the patterns that matches; names of the others are None."""

    def __init__(self, *patterns: Any) -> None:
        self.patterns = tuple(pattern_of(pattern) for pattern in patterns)

    def children(self) -> Sequence[Pattern]:
        return self.patterns

    def root_ops(self) -> frozenset[Operator] | None:
        found = [pattern.root_ops() for pattern in self.patterns]
        if any(ops is not None and not ops for ops in found):
            return frozenset()
        return None if None in found else frozenset().union(*found)  # type: ignore[arg-type]

    def plan(self, scope: Scope) -> Build:
        scope.pass_on(self, *self.patterns)
        plans = scope.alternatives(self.patterns)

        def build(then: Next) -> Step:
            ways = tuple((plan(then), blanks) for plan, blanks in plans)

            def step(value: Any, registers: Registers) -> bool:
                for way, blanks in ways:
                    for slot in blanks:
                        registers[slot] = None
                    if way(value, registers):
                        return True
                return False

            return step

        return build


class Through(Pattern):
    """The pattern, or the pattern under no-ops: calls that change neither shape nor dtype nor the order of elements.

    With `views`, reshapes to another shape are looked through as well; with `casts`, changes of dtype.
    Transposes never.
    """

    def __init__(self, pattern: Any, *, views: bool = False, casts: bool = False) -> None:
        self.pattern, self.views, self.casts = pattern_of(pattern), views, casts

    def children(self) -> Sequence[Pattern]:
        return (self.pattern,)

    def plan(self, scope: Scope) -> Build:
        plan = self.pattern.plan(scope)

        def build(then: Next) -> Step:
            inner = plan(then)

            def step(value: Any, registers: Registers) -> bool:
                if value.__class__ is not Tensor:
                    return inner(value, registers)
                return any(inner(under, registers) for under in reversed(list(self.layers_under(value))))

            return step

        return build

    def layers_under(self, value: Tensor | None) -> Iterator[Tensor]:
        """The value and those under it that this edge looks through, outermost first."""
        while value is not None:
            yield value
            value = self._under(value)

    def _under(self, value: Tensor) -> Tensor | None:
        layer = value.parent
        if layer is None or layer.op._schema.name not in TRANSPARENT:
            return None
        source = layer._args[0]
        if source.shape != value.shape and not (self.views and layer.op._schema.name != "aten::expand"):
            return None
        if source.dtype != value.dtype and not self.casts:
            return None
        return source


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
        return self.op in COMMUTATIVE and not any(isinstance(item, (Literal, Scalar)) for item in self.arguments[:2])


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


class AnyOp(Call):
    """A call of any operator, or of those that `where(layer)` accepts, on these tensors (`...`: and on others)."""

    def __init__(
        self, *inputs: Any, ops: Sequence[Operator] | None = None, where: Callable[[Layer], bool] | None = None
    ) -> None:
        self.open = not inputs or inputs[-1] is ...
        self.arguments = tuple(pattern_of(item) for item in inputs if item is not ...)
        self.ops, self.where = None if ops is None else frozenset(ops), where

    @property
    def has_many_outputs(self) -> bool:
        return False

    @property
    def is_commutative(self) -> bool:
        return False

    def title(self) -> str:
        return "a call of " + (" or ".join(sorted(map(operator_name, self.ops))) if self.ops else "the wanted kind")

    def root_ops(self) -> frozenset[Operator] | None:
        return self.ops

    def accepts(self) -> Callable[[Layer], bool]:
        ops, where = self.ops, self.where
        return lambda layer: (ops is None or layer.op in ops) and (where is None or where(layer))

    def plan_arguments(self, scope: Scope, slot: int) -> Callable[[Next], Next]:
        plans, count, more = [item.plan(scope) for item in self.arguments], len(self.arguments), self.open
        inputs = scope.new_slot()

        def part(index: int, step: Step) -> Next:
            return lambda registers: step(registers[inputs][index], registers)

        def build(then: Next) -> Next:
            for index in reversed(range(count)):
                then = part(index, plans[index](then))

            def body(registers: Registers) -> bool:
                found = registers[slot].inputs
                if len(found) < count or (len(found) > count and not more):
                    return False
                registers[inputs] = found
                return then(registers)

            return body

        return build


class Chain(Pattern):
    """`a + b + c + ...` however it is bracketed: the operands of nested calls of one associative operator.

    Chain(torch.add, Var("x"), Const("c"), rest="others") finds its operands in any order; `rest` names the list of the
    others (without it there are none). Inner calls belong to the chain only while nothing else reads them.
    """

    is_call = True

    def __init__(self, function: Callable, *operands: Any, rest: str | None = None) -> None:
        self.op, _ = resolve(function, (Var(), Var()))
        if self.op not in COMMUTATIVE:
            raise UsageError(f"{operator_name(self.op)} is not associative and commutative")
        self.operands, self.rest = tuple(pattern_of(operand) for operand in operands), rest

    def children(self) -> Sequence[Pattern]:
        return self.operands

    def root_ops(self) -> frozenset[Operator] | None:
        return frozenset({self.op})

    def height(self) -> int:
        return super().height() + len(self.operands)

    def leaves(self, root: Layer) -> tuple[list[Tensor], list[Layer]]:
        """The operands, left to right, and the calls that combine them."""
        found: list[Tensor] = []
        layers, pending = [root], list(reversed(root._args[:2]))
        while pending:
            value = pending.pop()
            layer = value.parent if value.__class__ is Tensor else None
            if layer is not None and layer.op is self.op and users_of(value) == 1 and layer._args[2:] == root._args[2:]:
                layers.append(layer)
                pending.extend(reversed(layer._args[:2]))
            else:
                found.append(value)
        return found, layers

    def plan(self, scope: Scope) -> Build:
        slot, used, found = scope.place(self), scope.new_slot(), scope.new_slot()
        inner = scope.new_slot()
        scope.calls += [(slot, self.root_ops(), True), (inner, self.root_ops(), True)]
        plans = [operand.plan(scope) for operand in sorted(self.operands, key=lambda operand: -operand.weight())]
        rest = None if self.rest is None else scope.slot_of(self.rest)
        if self.rest is not None:
            scope.bound.add(self.rest)
        count = len(plans)

        def choose(step: Step) -> Next:
            def pick(registers: Registers) -> bool:
                taken = registers[used]
                for index, leaf in enumerate(registers[found]):
                    if index not in taken:
                        registers[used] = (*taken, index)
                        if step(leaf, registers):
                            return True
                registers[used] = taken
                return False

            return pick

        def build(then: Next) -> Step:
            def collect(registers: Registers) -> bool:
                if rest is not None:
                    taken = registers[used]
                    registers[rest] = [leaf for i, leaf in enumerate(registers[found]) if i not in taken]
                return then(registers)

            following: Next = collect
            for plan in reversed(plans):
                following = choose(plan(following))

            def step(value: Any, registers: Registers) -> bool:
                layer = value.parent if value.__class__ is Tensor else None
                if layer is None or layer.op is not self.op:
                    return False
                leaves, layers = self.leaves(layer)
                if len(leaves) < count or (len(leaves) > count and rest is None):
                    return False
                registers[slot], registers[inner] = layer, layers[1:]
                registers[found], registers[used] = leaves, ()
                return following(registers)

            return step

        return build


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


def _tensor_tests(
    users: int | None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None,
    rank: int | None,
    shape: tuple | None,
    where: Callable[[Tensor], bool] | None,
    constant: bool | None,
) -> list[tuple[Callable[[Tensor], bool], str]]:
    """Each test with the words for its failure."""
    tests: list[tuple[Callable[[Tensor], bool], str]] = []
    if constant is not None:
        tests.append(
            (lambda value: value.is_constant == constant, "is not known at build time" if constant else "is constant")
        )
    if rank is not None:
        tests.append((lambda value: len(value.shape) == rank, f"has not the rank {rank}"))
    if dtype is not None:
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        tests.append((lambda value: value.dtype in dtypes, f"is not of {' or '.join(map(str, dtypes))}"))
    if shape is not None:
        tests.append((lambda value: _fits(value.shape, shape), f"has not the shape {shape}"))
    if users is not None:
        tests.append((lambda value: users_of(value) == users, f"has not {users} users"))
    if where is not None:
        tests.append((where, "is refused by its predicate"))
    return tests


def _fits(sizes: tuple, wanted: tuple) -> bool:
    return len(sizes) == len(wanted) and all(w is None or s == w for s, w in zip(sizes, wanted, strict=True))


# Steps


def _test_only(tests: tuple, then: Next) -> Step:
    def step(value: Any, registers: Registers) -> bool:
        return value.__class__ is Tensor and all(test(value) for test in tests) and then(registers)

    return step


def _bind(slot: int, tests: tuple, then: Next) -> Step:
    def step(value: Any, registers: Registers) -> bool:
        if value.__class__ is not Tensor:
            return False
        for test in tests:
            if not test(value):
                return False
        registers[slot] = value
        return then(registers)

    return step


def _same(slot: int, then: Next) -> Step:
    return lambda value, registers: registers[slot] is value and then(registers)


def _bind_or_same(slot: int, tests: tuple, then: Next) -> Step:
    bind, same = _bind(slot, tests, then), _same(slot, then)
    return lambda value, registers: (bind if registers[slot] is None else same)(value, registers)


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
