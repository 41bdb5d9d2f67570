"""Running a pattern against a layer.

A pattern is compiled once, into closures in continuation style: each step tests one value, writes what it binds into a
list of registers and calls the next step. A step with several ways (a commutative call, `OneOf`) calls its continuation
for each way until one succeeds. Which names are bound at a step is known when compiling, so that backtracking
never undoes anything: a register is written before every read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from enginery.errors import UsageError
from enginery.network.layer import Layer
from enginery.network.operator import Operator
from enginery.network.tensor import Tensor

Registers = list[Any]
Next = Callable[[Registers], bool]
Step = Callable[[Any, Registers], bool]
Build = Callable[[Next], Step]

ROOT, REASON, NETWORK, ARGS = range(4)
"""Registers of every program: the root layer; why the last constraint failed; the network; arguments of the run."""


class Constraint(Protocol):
    """A relation between captures. `words` completes the sentence "the match fails because ..."."""

    names: tuple[str, ...]
    words: str

    def holds(self, *values: Any) -> bool: ...


class Node(Protocol):
    """What the compiler asks of a pattern."""

    is_call: bool

    def bound_source(self, scope: Scope) -> Callable[[Registers], Tensor] | None: ...

    def plan(self, scope: Scope) -> Build: ...

    def root_ops(self) -> frozenset[Operator] | None: ...

    def root_output(self) -> int: ...

    def children(self) -> Sequence[Any]: ...

    def height(self) -> int: ...


@dataclass
class Scope:
    """What is bound where while a pattern is being compiled, in the order in which it will run."""

    slots: int = 4
    names: dict[str, int] = field(default_factory=dict)
    bound: set[str] = field(default_factory=set)
    maybe: set[str] = field(default_factory=set)
    """names that only some alternatives bind"""
    nodes: dict[int, int] = field(default_factory=dict)
    """register of the layer of each call that ran before, by the identity of its pattern"""
    reserved: dict[int, int] = field(default_factory=dict)
    """registers promised to calls that are still to come: the roots"""
    calls: list[tuple[int, frozenset[Operator] | None, bool]] = field(default_factory=list)
    """register, possible operators and `distinct` of each call"""
    policies: list[tuple[int, str]] = field(default_factory=list)
    """register and policy of each inner call"""
    separate: set[int] = field(default_factory=set)
    """registers of variables that must differ from all others"""

    def new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    def slot_of(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self.new_slot()
        return self.names[name]

    def place(self, node: Node) -> int:
        """The register for the layer of a call that runs next."""
        slot = self.reserved.get(id(node))
        slot = self.new_slot() if slot is None else slot
        self.nodes[id(node)] = slot
        return slot

    def pass_on(self, node: Node, *inner: Node) -> None:
        """What was promised to a node holds for the calls that it stands for."""
        slot = self.reserved.get(id(node))
        if slot is not None:
            self.reserved.update((id(item), slot) for item in inner)

    def rivals(self, ops: frozenset[Operator] | None, distinct: bool) -> tuple[int, ...]:
        """Registers of earlier calls that might hold the same layer and must not."""
        return tuple(
            slot
            for slot, others, alone in self.calls
            if (distinct and alone) and (ops is None or others is None or ops & others)
        )

    def alternatives(self, nodes: Sequence[Node], *, or_nothing: bool = False) -> list[tuple[Build, tuple[int, ...]]]:
        """Plans of nodes of which one will run, each with the registers that the others would have written."""
        before_bound, before_nodes = set(self.bound), dict(self.nodes)
        plans, bindings, layers = [], [], []
        for node in nodes:
            self.bound, self.nodes = set(before_bound), dict(before_nodes)
            first = len(self.calls)
            plans.append(node.plan(self))
            bindings.append(self.bound - before_bound)
            layers.append({slot for slot, _, _ in self.calls[first:]} - set(self.reserved.values()))
        everything, every_layer = set().union(*bindings), set().union(*layers)
        always = set() if or_nothing else set.intersection(*bindings)
        self.bound = before_bound | always
        self.maybe |= everything - always
        self.nodes = before_nodes
        return [
            (plan, (*(self.names[name] for name in sorted(everything - own)), *sorted(every_layer - own_layers)))
            for plan, own, own_layers in zip(plans, bindings, layers, strict=True)
        ]


class Matcher:
    """A compiled pattern, for one choice of the root at which a match starts."""

    def __init__(self, roots: Sequence[Node], constraints: Sequence[Constraint] = (), anchor: int = 0) -> None:
        """`roots[anchor]` is where a match starts; the others are found from the values that they share with it."""
        scope = Scope()
        start = roots[anchor]
        self.ops = start.root_ops()
        if self.ops is not None and not self.ops:
            raise UsageError("the pattern binds no root", "Its outermost part must be a call, not a variable")
        self.output = start.root_output()
        scope.reserved[id(start)] = ROOT
        plans = [start.plan(scope)]
        self.roots = []
        for root in roots:
            if root is not start and id(root) not in scope.nodes:
                scope.reserved[id(root)] = scope.new_slot()
                plans.append(self._plan_further_root(root, scope))
            self.roots.append(scope.reserved[id(root)] if id(root) in scope.reserved else scope.nodes[id(root)])
        names = scope.names
        for constraint in constraints:
            for name in constraint.names:
                if name not in names:
                    raise UsageError(f"a constraint names {name!r}, which the pattern does not bind")
        then = _finish([(c.holds, tuple(names[n] for n in c.names), c.words) for c in constraints], scope)
        for plan in reversed(plans[1:]):
            then = _from_root(plan(then))
        self.step = plans[0](then)
        self.blank: Registers = [None] * scope.slots
        self.names = names
        self.sources: tuple[Any, ...] = tuple(roots)
        self.constraints = tuple(constraints)
        self.policies = [(slot, policy) for slot, policy in scope.policies if slot not in self.roots]
        self.layer_slots = tuple(slot for slot, _, _ in scope.calls)
        self.height = max(root.height() for root in roots)

    def run(self, layer: Layer) -> Registers | None:
        """The registers if the pattern matches with its root at `layer`."""
        registers = self.blank.copy()
        return registers if self.step(layer.outputs[self.output], registers) else None

    def attempt(self, layer: Layer) -> tuple[bool, Registers]:
        """As `run`, with the registers of a failed match too: how many are written says how far it came."""
        registers = self.blank.copy()
        if self.output >= len(layer.outputs):
            return False, registers
        return self.step(layer.outputs[self.output], registers), registers

    def accepts(self, layer: Layer) -> bool:
        return (self.ops is None or layer.op in self.ops) and self.output < len(layer.outputs)

    def captures(self, layer: Layer) -> dict[str, Any] | None:
        registers = self.run(layer) if self.accepts(layer) else None
        return None if registers is None else {name: registers[slot] for name, slot in self.names.items()}

    def layers(self, registers: Registers) -> dict[Layer, None]:
        """The layers of a match, the root first."""
        return layers_in(registers, self.layer_slots)

    def _plan_further_root(self, root: Node, scope: Scope) -> Build:
        path = _path_to_bound(root, scope)
        if path is None:
            raise UsageError(
                "the roots of the pattern share no value", "Each further root must use a value of the first"
            )
        source, ops = path
        full = root.plan(scope)
        output = root.root_output()

        def build(then: Next) -> Step:
            step = full(then)

            def search(_: Any, registers: Registers) -> bool:
                return _climb(source(registers), ops, len(ops) - 1, step, output, registers)

            return search

        return build


def layers_in(registers: Registers, slots: Sequence[int]) -> dict[Layer, None]:
    found: dict[Layer, None] = {}
    for slot in slots:
        value = registers[slot]
        if value.__class__ is Layer:
            found[value] = None
        elif value is not None:
            found.update(dict.fromkeys(value))
    return found


def escapes(layer: Layer | None, matched: Collection[Layer]) -> bool:
    """Something outside a match reads an output of the layer."""
    return layer is not None and any(
        output.output_names or any(user not in matched for user in output._uses) for output in layer.outputs
    )


def _from_root(step: Step) -> Next:
    return lambda registers: step(registers[ROOT], registers)


def _finish(constraints: list[tuple[Callable, tuple[int, ...], str]], scope: Scope) -> Next:
    """The last continuation: relations between captures."""
    separate = tuple(scope.separate)
    private = tuple(slot for slot, policy in scope.policies if policy == "forbid")
    calls = tuple(slot for slot, _, _ in scope.calls)
    variables = tuple(set(scope.names.values()) - {slot for slot, _, _ in scope.calls})

    def finish(registers: Registers) -> bool:
        for slot in separate:
            for other in variables:
                if other != slot and registers[other] is registers[slot]:
                    registers[REASON] = "two variables are one value"
                    return False
        if private:
            matched = layers_in(registers, calls)
            for slot in private:
                if slot != ROOT and escapes(registers[slot], matched):
                    registers[REASON] = "an inner value has a user outside"
                    return False
        for holds, slots, words in constraints:
            if not holds(*[registers[slot] for slot in slots]):
                registers[REASON] = words
                return False
        return True

    return finish if constraints or separate or private else lambda registers: True


def _path_to_bound(
    root: Node, scope: Scope
) -> tuple[Callable[[Registers], Tensor], list[frozenset[Operator] | None]] | None:
    """How to come from a bound value up to `root`: where to read the value, and the operators from `root` down
    to it.
    """
    own = [root.root_ops()] if root.is_call else []
    for child in root.children():
        source = child.bound_source(scope)
        if source is not None:
            return source, own
        deeper = _path_to_bound(child, scope)
        if deeper is not None:
            return deeper[0], [*own, *deeper[1]]
    return None


def _climb(value: Tensor, ops: list, level: int, step: Step, output: int, registers: Registers) -> bool:
    """Tries every layer that is reached from `value` through users with these operators."""
    for user in value.users:
        if ops[level] is not None and user.op not in ops[level]:
            continue
        if level == 0:
            if output < len(user.outputs) and step(user.outputs[output], registers):
                return True
        elif any(_climb(further, ops, level - 1, step, output, registers) for further in user.outputs):
            return True
    return False
