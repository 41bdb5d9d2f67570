"""Where layers came from and what became of them: the applications of all phases, followed by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from enginery.rewriting.report import Application, Report


class Step(NamedTuple):
    """One application, and the phase that it belongs to."""

    phase: str
    application: Application


class Lineage:
    """Of one network through its phases. A network gives no name twice, so a name stands for one layer for ever."""

    def __init__(self, phases: Iterable[tuple[str, Report]]) -> None:
        self._made: dict[str, Step] = {}
        self._gone: dict[str, Step] = {}
        for phase, report in phases:
            for application in report.applications:
                step = Step(phase, application)
                self._made.update(dict.fromkeys(application.added, step))
                self._gone.update(dict.fromkeys(application.erased, step))

    def made(self, name: str) -> Step | None:
        """The application that made a layer; None for an imported one."""
        return self._made.get(name)

    def gone(self, name: str) -> Step | None:
        """The application with which a layer went; None if it is still there."""
        return self._gone.get(name)

    def history(self, name: str) -> list[Step]:
        """The applications behind a layer, the last one first."""
        steps, _ = self._behind(name)
        return steps

    def origins(self, name: str) -> list[str]:
        """The imported layers that a layer stands for; of an imported one, itself."""
        _, imported = self._behind(name)
        return imported

    def _behind(self, name: str) -> tuple[list[Step], list[str]]:
        steps: dict[int, Step] = {}
        imported: dict[str, None] = {}
        pending, seen = [name], {name}
        for current in pending:
            step = self._made.get(current)
            if step is None:
                imported[current] = None
                continue
            steps.setdefault(id(step), step)
            fresh = [source for source in step.application.replaced if source not in seen]
            seen.update(fresh)
            pending += fresh
        return list(steps.values()), list(imported)


__all__ = ["Lineage", "Step"]
