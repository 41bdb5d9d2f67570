"""What ENGINERY_DEBUG and ENGINERY_DUMP show of the phases: lines on standard error, and files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file

from enginery import env
from enginery.errors import UsageError
from enginery.network import Network
from enginery.rewriting.report import Report

IMPORTED = "imported"
VALUES = "values.safetensors"


@dataclass
class Watch:
    """Of one run of the phases; it is shown the network as imported, then behind each phase."""

    level: int = 0
    """of ENGINERY_DEBUG, see `lines`"""
    directory: Path | None = None
    """of ENGINERY_DUMP"""
    _shown: int = field(default=0, init=False)

    @classmethod
    def from_environment(cls) -> Watch:
        """Raises UsageError for a level that is no number from 0 to 5."""
        level = env.read_int("ENGINERY_DEBUG")
        return cls(level, env.read_path("ENGINERY_DUMP") if env.read("ENGINERY_DUMP") else None)

    def show(self, network: Network, name: str = IMPORTED, report: Report | None = None) -> None:
        """Raises UsageError where nothing can be written to the directory of ENGINERY_DUMP."""
        for line in lines(self.level, network, name, report):
            print(line, file=sys.stderr)
        if self.directory is not None:
            try:
                self._dump(self.directory, network, name)
            except OSError as error:
                cause = f"ENGINERY_DUMP: {error.filename or self.directory}: {error.strerror or error}"
                raise UsageError(cause, "Give a directory that can be written to, or unset it") from None
        self._shown += 1

    def _dump(self, directory: Path, network: Network, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / f"{self._shown}-{name.replace(' ', '-')}"
        stem.with_suffix(".txt").write_text(str(network))
        stem.with_suffix(".py").write_text(network.to_python())
        if network.values:
            tables = {name: value.detach().cpu().contiguous().clone() for name, value in network.values.items()}
            save_file(tables, directory / VALUES)


def lines(level: int, network: Network, name: str, report: Report | None) -> Iterator[str]:
    """1: counts of the phase; 2: each rewrite; 3: declines by reason; 4: the network; 5: the network as Python."""
    if level >= 1 and report is not None:
        counts = ", ".join(f"{rule.label} {rule.rewritten}" for rule in report.rules.values() if rule.rewritten)
        size = f"{report.layers_before} layers -> {report.layers_after}"
        yield f"{name}: {size} in {report.milliseconds:.1f} ms ({counts or 'nothing applied'})"
    elif level >= 1:
        yield f"{name}: {len(network)} layers"
    if level >= 2 and report is not None:
        yield from (f"  {application.rule}: {application}" for application in report.applications)
    if level >= 3 and report is not None:
        for rule in report.rules.values():
            yield from (f"  {rule.label} declined {count}: {reason}" for reason, count in rule.declined.items())
    if level >= 4:
        yield str(network)
    if level >= 5:
        yield network.to_python()


__all__ = ["Watch"]
