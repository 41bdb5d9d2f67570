"""Variables of a pattern: what is captured, and what must hold for it."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch

from enginery.network.tensor import Tensor
from enginery.rewriting.matcher import Build, Next, Registers, Scope, Step
from enginery.rewriting.pattern.call import Pattern, users_of


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
    is_plain = True

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

    is_rest = True

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
