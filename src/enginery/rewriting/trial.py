"""A rule tried at one layer and taken back: whether it would rewrite there, and if not, which of its lines says no."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from enginery.errors import RULE_ERRORS, in_one_line
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.binding import Way
from enginery.rewriting.edit import Edit
from enginery.rewriting.matcher import ARGS, NETWORK, Registers
from enginery.rewriting.rule import MatchFailure


def decline(network: Network, way: Way, layer: Layer, registers: Registers) -> str | None:
    """Why the code of a rule whose pattern fits declines, in words; None if it would rewrite.

    The rule runs, and the network is as before afterwards. A rule that returns None has run a second time, traced, so
    that the condition can be named.
    """
    reason = _run(network, way, layer, registers)
    if reason is None or reason:
        return reason
    trail = _Trail(way.rule.location.rpartition(":")[0])
    with trail:
        _run(network, way, layer, registers)
    return str(trail)


def _run(network: Network, way: Way, layer: Layer, registers: Registers) -> str | None:
    """The reason; empty if the rule gives none."""
    registers = [*registers]
    registers[NETWORK], registers[ARGS] = network, way.rule.args
    edit = Edit(network, layer)
    try:
        with network.appending_before(layer):
            result: Any = way.rewrite(registers)
    except MatchFailure as failure:
        return str(failure)
    except RULE_ERRORS as error:
        return f"it raises {in_one_line(error)}"
    finally:
        edit.abandon()
    return "" if result is None or result is False else None


class _Trail:
    """The last lines of a file that ran inside a `with` block."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._lines: list[int] = []

    def __enter__(self) -> None:
        self._former = sys.gettrace()
        sys.settrace(self._enter_frame)

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        sys.settrace(self._former)

    def _enter_frame(self, frame: FrameType, event: str, value: Any) -> Any:
        return self._step if frame.f_code.co_filename == self.file else None

    def _step(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "line" and self._lines[-1:] != [frame.f_lineno]:
            self._lines.append(frame.f_lineno)
        return self._step

    def __str__(self) -> str:
        """The last condition: the line before `return None`, or the one that returned it."""
        sources = [(linecache.getline(self.file, number).strip(), number) for number in reversed(self._lines)]
        said = next(((text, number) for text, number in sources if text not in _SILENT), None)
        if said is None:
            return "its code returns None"
        return f"its code declines by `{said[0]}` ({Path(self.file).name}:{said[1]})"


_SILENT: Iterable[str] = ("", "return", "return None", "return False", "continue", "break")

__all__ = ["decline"]
