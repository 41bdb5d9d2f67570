"""Patterns that leave something open: an absent operand, one of several, no-ops in between, any operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from enginery.network.layer import Layer
from enginery.network.operator import Operator, operator_name
from enginery.network.tensor import Tensor
from enginery.rewriting.matcher import Build, Next, Registers, Scope, Step
from enginery.rewriting.pattern.call import Call, Pattern, names_in, pattern_of
from enginery.rewriting.traits import TRANSPARENT


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
