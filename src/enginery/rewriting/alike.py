"""Texts about repeated layers, said once: what differs in the layer's number only is alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from enginery.rewriting.expectations import block_of


class Group(NamedTuple):
    """Lines about one block, and the numbers of all blocks of which the like holds."""

    block: str
    """such as model.layers.0; empty for what belongs to no block"""
    numbers: tuple[int, ...]
    lines: tuple[str, ...]

    def title(self) -> str:
        """`model.layers.0, and alike in 1-7 and 9`"""
        family, _, _ = self.block.rpartition(".")
        others = ranges(self.numbers[1:])
        return f"{self.block}, and alike in {family}.{others}" if others else self.block


def alike(items: Iterable[tuple[str, str]]) -> list[Group]:
    """Groups pairs of a module path and a line about it; a block is told by its first number."""
    lines: dict[str, list[str]] = {}
    for path, line in items:
        lines.setdefault(block_of(path), []).append(line)
    groups: dict[object, list[str]] = {}
    for block, said in lines.items():
        key = (block.rpartition(".")[0], *(_without_number(line, block) for line in said)) if block else None
        groups.setdefault(key, []).append(block)
    return [
        Group(blocks[0], tuple(map(_number, blocks)) if blocks[0] else (), tuple(lines[blocks[0]]))
        for blocks in groups.values()
    ]


def _number(block: str) -> int:
    return int(block.rpartition(".")[2])


def _without_number(line: str, block: str) -> str:
    """The block's own number and that of its neighbours as a distance, so that lines of equal blocks are equal."""
    family, own = block.rpartition(".")[0], _number(block)
    line = re.sub(rf"\b{re.escape(family)}\.(\d+)\b", lambda found: f"{family}.[{int(found[1]) - own:+d}]", line)
    return re.sub(rf"(?<=[A-Za-z_])\.{own}\b", ".[+0]", line)


def ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` of 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


__all__ = ["Group", "alike", "ranges"]
