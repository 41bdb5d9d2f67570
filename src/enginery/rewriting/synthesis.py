"""From the pattern of a rule to a network that it matches, for the generated equivalence tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from enginery.errors import EngineryError, UsageError
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.operator import signature
from enginery.network.tensor import Tensor
from enginery.rewriting import numerics
from enginery.rewriting.binding import bind
from enginery.rewriting.matcher import ARGS, NETWORK
from enginery.rewriting.pattern import (
    AnyOp,
    Anything,
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
)
from enginery.rewriting.rule import MatchFailure, PatternRewriter

_SHAPES: Sequence[tuple[int, ...]] = ((4, 8), (8, 8), (8,), (2, 4, 8), (2, 2, 4, 8), (4, 4), (1,), ())
_SCALARS: Sequence[Any] = (-1, 1e-5, 2, 0, 0.5, 1, (8,), (4, 8), True, torch.float32)
_TRIALS = 20_000


def network_for(rule: PatternRewriter, dtype: torch.dtype, given: Mapping[str, Any]) -> Network:
    """A network whose outputs are the roots of the rule's pattern and which the rule's `where` and `check` accept.

    Captures without a given shape or value take those of a small table, in all combinations. UsageError if none fits.
    """
    bound = bind(type(rule).__name__, rule)
    if bound.ways[0].matcher is None:
        raise UsageError(f"rule {bound.label} has no pattern to make a test from", "Write the network before by hand")
    matcher = bound.ways[0].matcher
    roots = matcher.sources
    shapes, scalars = _captures(roots)
    choices = [_given_shape(given, name) or _SHAPES for name in shapes] + [
        _given_scalar(given, name) or _SCALARS for name in scalars
    ]
    for trial, choice in enumerate(product(*choices)):
        if trial >= _TRIALS:
            break
        chosen = dict(zip((*shapes, *scalars), choice, strict=True))
        try:
            network, root = _Builder(chosen, dtype).build(roots)
        except (EngineryError, ValueError, TypeError, RuntimeError):
            continue
        matched, registers = matcher.attempt(root)
        registers[NETWORK], registers[ARGS] = network, bound.args
        try:
            if matched and (bound.ways[0].check is None or bound.ways[0].check(registers) in (None, True)):
                numerics.run(network, numerics.sample_values(network))
                return network
        except (MatchFailure, EngineryError, IndexError, TypeError, ValueError):
            continue
    raise UsageError(
        f"no network was found that rule {bound.label} matches", "Give shapes and values of its captures by name"
    )


def _given_shape(given: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = given.get(name)
    return () if value is None else (tuple(value.shape if isinstance(value, torch.Tensor) else value),)


def _given_scalar(given: Mapping[str, Any], name: str) -> Sequence[Any]:
    return (given[name],) if name in given else ()


def _captures(roots: Sequence[Pattern]) -> tuple[list[str], list[str]]:
    """Names of tensors and of scalars, in the order in which they are met; a bare pattern is known by its identity."""
    shapes: dict[str, None] = {}
    scalars: dict[str, None] = {}
    for node in _walk(roots):
        if isinstance(node, Var):
            shapes[_key(node)] = None
        elif isinstance(node, Vars):
            shapes[node.name] = None
        elif isinstance(node, Scalar):
            scalars[node.name] = None
        elif isinstance(node, Chain) and node.rest is not None:
            shapes[node.rest] = None
    return list(shapes), list(scalars)


def _walk(nodes: Sequence[Pattern]) -> Iterator[Pattern]:
    for node in nodes:
        yield node
        yield from _walk(node.children())


def _key(node: Var) -> str:
    return node.name or f"_{id(node)}"


class _Builder:
    """Makes the calls of a pattern in a network of its own."""

    def __init__(self, chosen: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.network, self.chosen, self.dtype = Network(), chosen, dtype
        self.made: dict[Any, Any] = {}

    def build(self, roots: Sequence[Pattern]) -> tuple[Network, Layer]:
        values = [self.value(root) for root in roots]
        for i, value in enumerate(values):
            layer = value.parent
            for j, output in enumerate(layer.outputs):
                self.network.set_output(f"output_{i}_{j}", output)
        return self.network, values[0].parent

    def value(self, node: Pattern) -> Any:
        key = node.name if isinstance(node, (Var, Vars, Scalar)) and node.name else id(node)
        if key not in self.made:
            self.made[key] = self._make(node)
        return self.made[key]

    def _make(self, node: Pattern) -> Any:
        if isinstance(node, Var):
            return self._tensor(_key(node), node)
        if isinstance(node, Vars):
            return tuple(self._tensor(f"{node.name}_{i}", node, node.name) for i in range(max(node.at_least, 2)))
        if isinstance(node, Scalar):
            return self.chosen[node.name]
        if isinstance(node, Literal):
            return node.value
        if isinstance(node, Anything):
            return ...
        if isinstance(node, (Optional, Through)):
            return self.value(node.pattern)
        if isinstance(node, OneOf):
            return self.value(node.patterns[0])
        if isinstance(node, Items):
            return tuple(item for child in node.items for item in self._spread(child))
        if isinstance(node, Output):
            return self.value(node.call).parent.outputs[node.index]
        if isinstance(node, Chain):
            return self._chain(node)
        if isinstance(node, AnyOp):
            raise UsageError("a call of any operator cannot be made up")
        return self._call(node)

    def _spread(self, child: Pattern) -> tuple:
        value = self.value(child)
        return value if isinstance(child, Vars) else (value,)

    def _tensor(self, name: str, node: Any, key: str | None = None) -> Tensor:
        dtype = getattr(node, "dtype", None) or self.dtype
        add = self.network.add_constant if node.constant else self.network.add_input
        return add(name, self.chosen[key or name], dtype)

    def _call(self, node: Any) -> Tensor:
        values = [self.value(argument) for argument in node.arguments]
        while values and values[-1] is ...:
            values.pop()
        known = signature(node.op)
        given = {name: value for name, value in zip(known.names, values, strict=False) if value is not ...}
        return self.network.add_layer(node.op, known.normalise((), given)).outputs[0]

    def _chain(self, node: Chain) -> Tensor:
        values = [self.value(operand) for operand in node.operands]
        if node.rest is not None:
            values.append(self.network.add_input(node.rest, self.chosen[node.rest], self.dtype))
        result = values[0]
        for value in values[1:]:
            result = self.network.call(node.op, result, value)
        return result
