"""The environment variables that Enginery reads, all of them, in one table (`docs/environment.md` prints it)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from enginery.errors import UsageError


@dataclass(frozen=True)
class Knob:
    name: str
    default: str
    meaning: str
    most: int = 0
    """of a number"""


KNOBS = (
    Knob("ENGINERY_CACHE", "~/.cache/enginery", "directory of built engines, compiled kernels, measured facts"),
    Knob("ENGINERY_THREADS", "0", "threads of the CPU kernels; 0: one per physical core this process may use", 1024),
    Knob("ENGINERY_CXX", "g++", "C++ compiler of the CPU kernels and of compiled regions"),
    Knob("ENGINERY_DEBUG", "0", "1: phases and counts; 2: each rewrite; 3: declines; 4: networks; 5: as Python too", 5),
    Knob("ENGINERY_DUMP", "", "directory that receives the network behind each phase, as text and as runnable Python"),
)


def read(name: str) -> str:
    """The value of a knob of the table, or its default: also where it is empty."""
    return os.environ.get(name) or _knob(name).default


def read_int(name: str) -> int:
    """From 0 to the most of the table."""
    text, most = read(name), _knob(name).most
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) > most:
        raise UsageError(f"{name}={text!r} is no whole number from 0 to {most}", f"Unset {name} or give one")
    return int(text)


def _knob(name: str) -> Knob:
    return next(knob for knob in KNOBS if knob.name == name)


def read_path(name: str) -> Path:
    path = read(name)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{name}={path!r} is in the home of nobody here", "Give a directory") from None


def cache_dir() -> Path:
    return read_path("ENGINERY_CACHE")
