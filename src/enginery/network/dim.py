"""Symbolic sizes: integer polynomials over named symbols, with floor division, remainder, minimum and maximum as atoms.

    tokens = Dim.symbol("tokens")
    2 * tokens + 1            # Dim, printed as `2*tokens + 1`
    (2 * tokens) // tokens    # 2, a plain int: constants are never wrapped

Two sizes are equal exactly if their normal forms are. Dims are immutable and hashable, and cost about a microsecond
each, where a sympy expression costs a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

from enginery.errors import NetworkError

Size = Union[int, "Dim"]
Atom = Union[str, tuple[str, Size, Size]]  # noqa: UP007  (Size is not yet a type)
"""A symbol's name, or (`//` | `%` | `min` | `max`, left, right)."""

_FUNCTIONS: Mapping[str, Callable[[int, int], int]] = {
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
}


class Dim:
    """A size that is not known before the network runs. `terms` maps a product of atoms to its coefficient."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[tuple[Atom, ...], int]) -> None:
        self.terms = dict(terms)
        self._hash = hash(frozenset(self.terms.items()))

    @staticmethod
    def symbol(name: str) -> Dim:
        return Dim({(name,): 1})

    @staticmethod
    def apply(function: str, left: Size, right: Size) -> Size:
        """`//`, `%`, `min` or `max` of two sizes, simplified where that is exact for all non-negative symbols."""
        if isinstance(left, int) and isinstance(right, int):
            return _FUNCTIONS[function](left, right)
        if left == right:
            return {"//": 1, "%": 0}.get(function, left)
        if function in ("//", "%") and (quotient := _exact_quotient(left, right)) is not None:
            return quotient if function == "//" else 0
        return Dim({((function, left, right),): 1})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Makes torch accept a Dim for a size, as in `torch.reshape(x, (tokens, 4))`; the tensor does the rest."""
        if all(issubclass(kind, Dim) for kind in types):
            name = getattr(function, "__name__", str(function))
            raise NetworkError(
                f"{name} of a symbolic size names no network", "Use Network.call, or a method such as x.new_full"
            )
        return NotImplemented

    def __add__(self, other: Size) -> Size:
        if not isinstance(other, (int, Dim)):
            return NotImplemented
        terms = dict(self.terms)
        for product, factor in _terms(other):
            terms[product] = terms.get(product, 0) + factor
        return _normal(terms)

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, int):
            return _normal({product: factor * other for product, factor in self.terms.items()})
        if not isinstance(other, Dim):
            return NotImplemented
        terms: dict[tuple[Atom, ...], int] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                product = tuple(sorted(left + right, key=str))
                terms[product] = terms.get(product, 0) + a * b
        return _normal(terms)

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __rsub__(self, other: int) -> Size:
        return self * -1 + other

    def __neg__(self) -> Size:
        return self * -1

    def __floordiv__(self, other: Size) -> Size:
        return Dim.apply("//", self, other)

    def __rfloordiv__(self, other: int) -> Size:
        return Dim.apply("//", other, self)

    def __mod__(self, other: Size) -> Size:
        return Dim.apply("%", self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        text = ""
        for product, factor in sorted(self.terms.items(), key=lambda term: (-len(term[0]), str(term[0]))):
            factors = [_atom_text(atom) for atom in product]
            if abs(factor) != 1 or not factors:
                factors.insert(0, str(abs(factor)))
            sign = (" - " if text else "-") if factor < 0 else (" + " if text else "")
            text += sign + "*".join(factors)
        return text

    @property
    def name(self) -> str | None:
        """The name of a plain symbol; None for any other size."""
        if len(self.terms) == 1:
            ((product, factor),) = self.terms.items()
            if factor == 1 and len(product) == 1 and isinstance(product[0], str):
                return product[0]
        return None

    @property
    def symbols(self) -> frozenset[str]:
        found: set[str] = set()
        for product in self.terms:
            for atom in product:
                found |= {atom} if isinstance(atom, str) else symbols_of(atom[1:])
        return frozenset(found)

    def substitute(self, values: Mapping[str, Size]) -> Size:
        """The size with symbols replaced; an `int` once all of them are. Symbols that are not named stay."""
        total: Size = 0
        for product, factor in self.terms.items():
            value: Size = factor
            for atom in product:
                value = value * _atom_value(atom, values)
            total = total + value
        return total


def symbols_of(sizes: Iterable[Size]) -> frozenset[str]:
    return frozenset().union(*(size.symbols for size in sizes if isinstance(size, Dim)))


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """A size as a number. Raises KeyError with the name of a symbol that has no value."""
    if isinstance(size, int):
        return size
    missing = size.symbols - values.keys()
    if missing:
        raise KeyError(min(missing))
    result = size.substitute(values)
    assert isinstance(result, int)  # noqa: S101  (all symbols are bound)
    return result


def _terms(size: Size) -> Iterable[tuple[tuple[Atom, ...], int]]:
    return size.terms.items() if isinstance(size, Dim) else (((), size),)


def _normal(terms: Mapping[tuple[Atom, ...], int]) -> Size:
    kept = {product: factor for product, factor in terms.items() if factor}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Dim(kept)


def _exact_quotient(left: Size, right: Size) -> Size | None:
    """left / right where every term of left is divisible by right, a number or a single product; else None."""
    divisor = dict(_terms(right))
    if len(divisor) != 1:
        return None
    ((product, factor),) = divisor.items()
    quotient: dict[tuple[Atom, ...], int] = {}
    for candidate, coefficient in _terms(left):
        rest = list(candidate)
        for atom in product:
            if atom not in rest:
                return None
            rest.remove(atom)
        if factor == 0 or coefficient % factor:
            return None
        quotient[tuple(rest)] = coefficient // factor
    return _normal(quotient)


def _atom_text(atom: Atom) -> str:
    if isinstance(atom, str):
        return atom
    function, left, right = atom
    return f"({left} {function} {right})" if function in ("//", "%") else f"{function}({left}, {right})"


def _atom_value(atom: Atom, values: Mapping[str, Size]) -> Size:
    if isinstance(atom, str):
        return values.get(atom, Dim.symbol(atom))
    function, left, right = atom
    left = left.substitute(values) if isinstance(left, Dim) else left
    right = right.substitute(values) if isinstance(right, Dim) else right
    return Dim.apply(function, left, right)
