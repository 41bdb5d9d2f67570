"""What commands print: JSON for machines, tables for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from enginery.errors import StepError, UsageError


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def print_note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def require_success(last: Any) -> None:
    """Raises StepError if a request, whose last output this is, failed."""
    if last is not None and (error := last.outputs[0].error) is not None:
        raise StepError(f"the request failed: {error}")


def write_atomically(file: Path, text: str, flag: str) -> None:
    """The old file or the new one, never half. Raises UsageError naming the flag where nothing can be written."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except OSError as error:
        raise UsageError(f"{flag} {file}: {error.strerror or error}", "Give a file that can be written") from None
    finally:
        draft.unlink(missing_ok=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers to the right, text to the left; colours only on a terminal (rich honours NO_COLOR)."""
    from rich.console import Console
    from rich.table import Table

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """Left to `main`."""
            raise BrokenPipeError

    cells = [[f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1].isdigit() for row in cells if row[index])
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    Output().print(table)
