"""Relations between captures, declared in a rule's `where`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Relation:
    """A predicate over named captures. `words` says what does not hold when it fails."""

    names: tuple[str, ...]
    predicate: Callable[..., bool]
    words: str

    def holds(self, *values: Any) -> bool:
        return self.predicate(*values)


def same_shape(*names: str) -> Relation:
    return Relation(
        names, lambda *values: len({value.shape for value in values}) == 1, f"shapes of {_list(names)} differ"
    )


def same_dtype(*names: str) -> Relation:
    return Relation(
        names, lambda *values: len({value.dtype for value in values}) == 1, f"dtypes of {_list(names)} differ"
    )


def same_size(dim: int, *names: str) -> Relation:
    """The sizes of one dimension are equal, counted from the end if `dim` is negative."""

    def predicate(*values: Any) -> bool:
        return len({value.shape[dim] if -value.rank <= dim < value.rank else None for value in values}) == 1

    return Relation(names, predicate, f"sizes of {_list(names)} differ in dimension {dim}")


def same_type(*names: str) -> Relation:
    def predicate(*values: Any) -> bool:
        return len({(value.shape, value.dtype) for value in values}) == 1

    return Relation(names, predicate, f"types of {_list(names)} differ")


def has_rank(name: str, rank: int) -> Relation:
    return Relation((name,), lambda value: len(value.shape) == rank, f"{name} has not the rank {rank}")


def has_dtype(name: str, *dtypes: torch.dtype) -> Relation:
    return Relation((name,), lambda value: value.dtype in dtypes, f"{name} is not of {_list(tuple(map(str, dtypes)))}")


def is_static(*names: str) -> Relation:
    """No size depends on a symbol."""

    def predicate(*values: Any) -> bool:
        return all(isinstance(size, int) for value in values for size in value.shape)

    return Relation(names, predicate, f"a size of {_list(names)} is symbolic")


def holds(words: str, predicate: Callable[..., bool], *names: str) -> Relation:
    """Any relation of your own: `holds("heads do not divide", lambda q, k: ..., "q", "k")`."""
    return Relation(names, predicate, words)


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(names)
