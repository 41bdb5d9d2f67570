"""This machine's processor as a device, measured once: read bandwidth and matrix products, by PyTorch."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from enginery.analysis.device import Device
from enginery.device_facts import path_of, read, write

READ_BYTES = 256 << 20
"""beyond the caches of most processors"""
MATRIX = 1024
REPEATS = 15
DTYPES = (torch.float32, torch.bfloat16)


def measured_cpu(*, again: bool = False) -> Device:
    """The best of a few runs with as many threads as torch has now, about a second; kept in the cache directory.

    `again` measures even if there are numbers, and keeps the better ones: a busy machine is never too fast.
    """
    facts = {"processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = path_of(f"cpu-{key}")
    found = _read(path)
    if found is None or again:
        measured = {**facts, **_measure()}
        found = measured if found is None else _better(found, measured)
        write(path, found)
    flops = {getattr(torch, name): float(value) for name, value in found["flops"].items()}
    source = f"measured here by a sum of {READ_BYTES >> 20} MiB and a product of {MATRIX}² matrices; kept in {path}"
    return Device(f"cpu, {facts['threads']} threads", float(found["bandwidth"]), MappingProxyType(flops), source)


def _measure() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    bandwidth = READ_BYTES / _best(torch.rand(READ_BYTES // 4, generator=generator).sum)
    matrix = torch.rand(MATRIX, MATRIX, generator=generator)
    flops: dict[str, float] = {}
    for dtype in DTYPES:
        operand = matrix.to(dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * MATRIX**3 / _best(partial(torch.mm, operand, operand))
    # What has no fast instructions is widened to float32, which costs less than it moves.
    flops = {name: max(value, flops["float32"]) for name, value in flops.items()}
    return {"bandwidth": bandwidth, "flops": flops}


def _better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    flops = {name: max(value, one["flops"].get(name, 0.0)) for name, value in other["flops"].items()}
    return {**other, "bandwidth": max(one["bandwidth"], other["bandwidth"]), "flops": flops}


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path) -> dict[str, Any] | None:
    """What was measured before; None if nothing was, or it is no such file."""
    found = read(path)
    try:
        positive = [found["bandwidth"], found["flops"]["float32"], *found["flops"].values()]
        known = all(isinstance(getattr(torch, name, None), torch.dtype) for name in found["flops"])
        return found if known and all(float(value) > 0 for value in positive) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
