"""Prints a benchmark's results as a table and as one JSON line, and on request keeps them in `benchmarks/results/`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "triton")

Row = Mapping[str, Any]


def record(
    name: str,
    results: Mapping[str, Any],
    *,
    table: Mapping[str, Row] | None = None,
    write: bool = False,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Prints `table` (row name -> column -> value; by default the results themselves) and the record as one JSON line.

    With `write`, the record goes to `benchmarks/results/NAME.json` as well. `packages` have their versions recorded
    beside the usual ones. Returns the record:
    {"name", "command", "when", "hardware", "versions", "results"}.
    """
    entry = entry_of(name, results, packages)
    print_table(name, results if table is None else table)
    print(json.dumps(entry))
    if write:
        write_entry(entry)
    return entry


def entry_of(name: str, results: Mapping[str, Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """The record of results that were measured now and here."""
    return {
        "name": name,
        "command": " ".join(["python", *sys.argv]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(packages),
        "results": results,
    }


def write_entry(entry: Mapping[str, Any], path: Path | None = None) -> None:
    path = path or RESULTS / f"{entry['name']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entry, indent=2) + "\n")


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, and the GPU with its driver if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores}
    return facts | _gpu()


def _gpu() -> dict[str, str]:
    """Of the first GPU, asked of its driver: a process that only collects results need not load torch."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        name, driver, memory = answer.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}
    return {"gpu": name, "driver": driver, "gpu memory": memory}


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *more)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """`rows`: row name -> column -> value; rows that are no mappings are left out."""
    rows = {name: row for name, row in rows.items() if isinstance(row, Mapping)}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(_shown(row.get(column, "")) for column in columns))
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)
