"""What the shape rules share: axes, broadcasting, products and comparisons of sizes that may be symbolic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size
from enginery.network.tensor import Tensor

Shape = tuple[Size, ...]
Types = tuple[tuple[Shape, torch.dtype], ...]
Rule = Callable[..., Types]


def axis(dim: int, rank: int) -> int:
    """An axis counted from the front. A scalar is treated as a vector of one element, as torch does."""
    bound = rank or 1
    if -bound <= dim < bound:
        return dim + bound if dim < 0 else dim
    raise NetworkError(f"dimension {dim} is out of range for a tensor of rank {rank}")


def axes(dims: Sequence[int] | int | None, rank: int) -> list[int]:
    """Axes counted from the front, sorted; all of them for None or an empty list."""
    if dims is None or dims == ():
        return list(range(rank))
    if isinstance(dims, int):
        return [axis(dims, rank)]
    found = sorted(axis(dim, rank) for dim in dims)
    if len(set(found)) != len(found):
        raise NetworkError(f"a dimension appears twice in {list(dims)}")
    return found


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = size * total
    return total


def differ(left: Size, right: Size) -> bool:
    """The two sizes cannot be equal. Symbols stand for at least 1."""
    if left == right:
        return False
    gap = left - right
    if isinstance(gap, int):
        return gap != 0
    low, high = bounds_of(gap, {})
    return low > 0 or high < 0


def at_most(left: Size, right: Size, ranges: Mapping[str, tuple[int, int | None]]) -> bool:
    """left ≤ right for every value that the symbols may take."""
    gap = right - left
    if isinstance(gap, int):
        return gap >= 0
    return lower_bound(gap, ranges) >= 0


def lower_bound(size: Dim, ranges: Mapping[str, tuple[int, int | None]]) -> float:
    """A number that the size is never below; −inf where the terms do not tell."""
    total = 0.0
    for atoms, factor in size.terms.items():
        low, high = 1.0, 1.0
        for atom in atoms:
            bounds = ranges.get(atom, (1, None)) if isinstance(atom, str) else _atom_bounds(atom, ranges)
            low *= bounds[0]
            high *= torch.inf if bounds[1] is None else bounds[1]
        total += factor * (low if factor > 0 else high)
    return total


def _atom_bounds(atom: Any, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[float, float]:
    function, left, right = atom
    values = [(side, side) if isinstance(side, int) else bounds_of(side, ranges) for side in (left, right)]
    (a, b), (c, d) = values
    if function == "min":
        return min(a, c), min(b, d)
    if function == "max":
        return max(a, c), max(b, d)
    if a < 0 or c <= 0:
        return -torch.inf, torch.inf
    return (a // d if d != torch.inf else 0, b // c if b != torch.inf else b) if function == "//" else (0, d - 1)


def bounds_of(size: Dim, ranges: Mapping[str, tuple[int, int | None]]) -> tuple[float, float]:
    high = -size
    return lower_bound(size, ranges), -lower_bound(high, ranges) if isinstance(high, Dim) else -high


def require_equal(left: Size, right: Size, what: str) -> None:
    if left != right and differ(left, right):
        raise NetworkError(f"{what}: {left} and {right} differ")


def require_same_dtype(what: str, *tensors: Tensor | None) -> None:
    dtypes = {tensor.dtype: None for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise NetworkError(f"{what} of one dtype are expected, not {names}")


def broadcast(left: Shape, right: Shape) -> Shape:
    if left == right or not right:
        return left
    if not left:
        return right
    if len(left) < len(right):
        left, right = right, left
    extra = len(left) - len(right)
    result = list(left)
    for i, size in enumerate(right, extra):
        other = result[i]
        if size == other or size == 1:
            continue
        if other == 1:
            result[i] = size
        elif differ(size, other):
            raise NetworkError(f"shapes {show(left)} and {show(right)} do not broadcast")
        elif isinstance(size, int):
            result[i] = size
    return tuple(result)


def broadcast_all(shapes: Iterable[Shape]) -> Shape:
    result: Shape = ()
    for shape in shapes:
        result = broadcast(result, shape)
    return result


def minimum(left: Size, right: Size, ranges: Mapping[str, tuple[int, int | None]]) -> Size:
    if at_most(left, right, ranges):
        return left
    return right if at_most(right, left, ranges) else Dim.apply("min", left, right)


def ceil_div(size: Size, step: int) -> Size:
    return size if step == 1 else -(-size // step) if isinstance(size, int) else (size + (step - 1)) // step


def replaced(shape: Shape, index: int, *sizes: Size) -> Shape:
    """The shape with one axis replaced by others (by none: removed)."""
    return (*shape[:index], *sizes, *shape[index + 1 :])


def show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def overloads(names: str) -> list[Any]:
    """The ATen operators of names such as `add.Tensor`, `relu`; those that this torch does not have are left out."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if op is not None:
            found.append(op)
    return found


def table(rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    """Rules by operator, from rules by space-separated names."""
    return {op: rule for names, rule in rules.items() for op in overloads(names)}
