"""Types by torch's own shape propagation (FakeTensor with a ShapeEnv), for operators without a shape rule.

It takes a third of a millisecond to a few milliseconds per call. The machinery is imported by the functions that use
it: it takes a second, which opening an engine need not spend.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size
from enginery.network.operator import Operator, signature

if TYPE_CHECKING:
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

_HINTS = (37, 41, 43, 47, 53, 59, 61, 67)
"""Sizes at which torch tries the symbols; primes that no model uses, so that no two sizes agree by chance."""


class Type(NamedTuple):
    shape: tuple[Size, ...]
    dtype: torch.dtype


class Literal(NamedTuple):
    kind: type
    value: Any


def infer(op: Operator, key: tuple) -> tuple[tuple[tuple[Size, ...], torch.dtype], ...]:
    """The types of the outputs; `key` holds a Type for each tensor and a Literal for each number of the call."""
    import sympy
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv()
    symbols: dict[str, Any] = {}

    def integer(size: Size) -> Any:
        return size if isinstance(size, int) else _sym_int(size, symbols, shape_env)

    def argument(value: Any) -> Any:
        if isinstance(value, Type):
            return torch.empty([integer(size) for size in value.shape], dtype=value.dtype)
        if isinstance(value, Literal):
            return value.value
        if isinstance(value, tuple):
            return [argument(item) for item in value]
        return integer(value) if isinstance(value, Dim) else value

    with FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=False):
        try:
            result = call(op, [argument(value) for value in key])
        except Exception as error:
            raise NetworkError(_first_line(error)) from None
    names = {symint.node.expr: name for name, symint in symbols.items()}
    fixed = any(isinstance(guard.expr, sympy.Eq) for guard in shape_env.guards)
    if fixed or any(symbol in shape_env.replacements for symbol in names):
        raise NetworkError("the call holds for one value of a symbolic size only")
    outputs = result if isinstance(result, (tuple, list)) else () if result is None else (result,)
    return tuple((sizes_of(output, names), output.dtype) for output in outputs)


def call(op: Operator, values: list) -> Any:
    """Calls an operator with a value for each argument of its schema."""
    known = signature(op)
    plain = [value for i, value in enumerate(values) if i not in known.keyword_only]
    named = {known.names[i]: values[i] for i in known.keyword_only}
    return op(*plain, **named)


def sizes_of(tensor: torch.Tensor, names: Mapping[sympy.Symbol, str]) -> tuple[Size, ...]:
    return tuple(to_size(size, names) for size in tensor.shape)


def to_size(size: int | torch.SymInt, names: Mapping[sympy.Symbol, str]) -> Size:
    """A size of torch as ours; `names` names the symbols. Raises NetworkError for one that depends on data."""
    return size if isinstance(size, int) else from_sympy(size.node.expr, names)


def from_sympy(expression: sympy.Expr, names: Mapping[sympy.Symbol, str]) -> Size:
    import sympy
    from torch.utils._sympy import functions as symbolic

    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        if expression not in names:
            raise NetworkError(f"the size {expression} depends on data")
        return Dim.symbol(names[expression])
    parts = [from_sympy(part, names) for part in expression.args if not _is_ratio(part)]
    if isinstance(expression, sympy.Add):
        return reduce(operator.add, parts)
    if isinstance(expression, sympy.Mul) and len(parts) == len(expression.args):
        return reduce(operator.mul, parts)
    if isinstance(expression, sympy.Pow) and isinstance(parts[1], int) and parts[1] > 0:
        return reduce(operator.mul, [parts[0]] * parts[1])
    if isinstance(expression, (symbolic.FloorDiv, symbolic.CleanDiv)):
        return Dim.apply("//", *parts)
    if isinstance(expression, (symbolic.Mod, symbolic.PythonMod)):
        return Dim.apply("%", *parts)
    if isinstance(expression, symbolic.CeilToInt | symbolic.CeilDiv) and len(parts) == 2:
        return Dim.apply("//", parts[0] + parts[1] - 1, parts[1])
    if isinstance(expression, symbolic.ModularIndexing):
        return Dim.apply("%", Dim.apply("//", parts[0], parts[1]), parts[2])
    if isinstance(expression, (symbolic.Max, sympy.Max)):
        return reduce(lambda a, b: Dim.apply("max", a, b), parts)
    if isinstance(expression, (symbolic.Min, sympy.Min)):
        return reduce(lambda a, b: Dim.apply("min", a, b), parts)
    raise NetworkError(f"the size {expression} has no form in a network")


def _is_ratio(part: sympy.Basic) -> bool:
    return bool(part.is_Rational) and not part.is_Integer


def _sym_int(size: Dim, symbols: dict[str, Any], shape_env: ShapeEnv) -> Any:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    for name in sorted(size.symbols):
        if name not in symbols:
            hint = _HINTS[len(symbols) % len(_HINTS)]
            symbol = shape_env.create_symbol(
                hint, source=ConstantSource(f"size_{name}"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            symbols[name] = shape_env.create_symintnode(symbol, hint=hint)
    total: Any = 0
    for atoms, factor in size.terms.items():
        total = total + reduce(operator.mul, [_atom(atom, symbols, shape_env) for atom in atoms], factor)
    return total


def _atom(atom: Any, symbols: dict[str, Any], shape_env: ShapeEnv) -> Any:
    if isinstance(atom, str):
        return symbols[atom]
    function, *sides = atom
    left, right = (side if isinstance(side, int) else _sym_int(side, symbols, shape_env) for side in sides)
    if function == "//":
        return left // right
    if function == "%":
        return left % right
    return torch.sym_min(left, right) if function == "min" else torch.sym_max(left, right)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
