"""The algorithms of cuBLAS that were measured to be the fastest, by product; kept in a file."""

from __future__ import annotations

from bisect import bisect_left
from ctypes import sizeof
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginery.device_facts import read, write
from enginery.kernels.triton.cublas_lt import TYPES, Algorithm, Opaque


@dataclass(frozen=True)
class Family:
    """Products that differ in their rows only."""

    features: int
    depth: int
    dtype: torch.dtype
    scaled: bool = False
    """Of float8: with the scales of rows and features, which cuBLAS applies or a pass over the result."""

    @classmethod
    def of(cls, weight: torch.Tensor, *, scaled: bool = False) -> Family:
        return cls(weight.shape[0], weight.shape[1], weight.dtype, scaled)


@dataclass(frozen=True)
class Choice:
    algorithm: Algorithm
    by_rows: bool = False
    """cuBLAS applies the scales."""


class Choices:
    """The fastest found, by family and rows, or None where cuBLAS proposes nothing; in a file, if there is a path."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[Family, dict[int, Choice | None]] = {}
        self._has_new = False
        for family, rows, choice in () if path is None else _read(path):
            self._known.setdefault(family, {})[rows] = choice

    def keep(self, family: Family, rows: int, choice: Choice | None) -> None:
        self._known.setdefault(family, {})[rows] = choice
        self._has_new = True

    def known(self, family: Family, rows: int) -> bool:
        return rows in self._known.get(family, {})

    def nearest(self, family: Family, rows: int) -> Choice | None:
        """That of the least number of rows that is not below `rows`."""
        known = self._known.get(family, {})
        ordered = sorted(known)
        place = bisect_left(ordered, rows)
        return known[ordered[place]] if place < len(ordered) else None

    def write(self) -> None:
        """What is new, beside what other processes have written. A directory that cannot be written keeps nothing."""
        if self._path is None or not self._has_new:
            return
        found = {(family, rows): choice for family, rows, choice in _read(self._path)}
        for family, known in self._known.items():
            found |= {(family, rows): choice for rows, choice in known.items() if choice is not None}
        write(self._path, [_entry(*key, choice) for key, choice in found.items()])
        self._has_new = False


def _entry(family: Family, rows: int, choice: Choice) -> dict[str, Any]:
    return {
        "features": family.features,
        "depth": family.depth,
        "dtype": _name(family.dtype),
        "scaled": family.scaled,
        "rows": rows,
        "algorithm": choice.algorithm.code.hex(),
        "workspace": choice.algorithm.workspace,
        "by_rows": choice.by_rows,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(path: Path) -> list[tuple[Family, int, Choice]]:
    """Nothing if there is no such file, or it is none of ours."""
    dtypes = {_name(dtype): dtype for dtype in TYPES}
    try:
        return [
            (
                Family(int(each["features"]), int(each["depth"]), dtypes[each["dtype"]], bool(each["scaled"])),
                int(each["rows"]),
                Choice(Algorithm(_code(each["algorithm"]), int(each["workspace"])), bool(each["by_rows"])),
            )
            for each in read(path)
        ]
    except (ValueError, KeyError, TypeError, OverflowError):
        return []


def _code(text: str) -> bytes:
    code = bytes.fromhex(text)
    if len(code) != sizeof(Opaque):
        raise ValueError("no algorithm is encoded so")
    return code
