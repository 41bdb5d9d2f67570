"""Benchmarks of kernels made small: the first of each kind of call is made once, and no candidate compiled ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import pytest
from tests.kernels.triton_device import DEVICE


def make_small(monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType, **values: Any) -> None:
    common = {"DEVICE": DEVICE, "L2_BYTES": 0, "seconds": made_once, "compile_all": all_compile}
    for name, value in (common | values).items():
        monkeypatch.setattr(benchmark, name, value)


def made_once(calls: Sequence[Callable]) -> float:
    calls[0]()
    return 1e-6


def all_compile(run: Callable, jobs: Iterable, workers: int) -> set:
    return set(jobs)
