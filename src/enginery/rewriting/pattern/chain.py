"""Nested calls of one associative operator as one pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from enginery.errors import UsageError
from enginery.network.functions import resolve
from enginery.network.layer import Layer
from enginery.network.operator import Operator, operator_name
from enginery.network.tensor import Tensor
from enginery.rewriting.matcher import Build, Next, Registers, Scope, Step
from enginery.rewriting.pattern.call import Pattern, pattern_of, users_of
from enginery.rewriting.pattern.variable import Var
from enginery.rewriting.traits import COMMUTATIVE


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
