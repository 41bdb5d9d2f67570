"""What commands print: JSON for machines, tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers to the right, text to the left; colours only on a terminal (rich honours NO_COLOR)."""
    from rich.console import Console
    from rich.table import Table

    cells = [[f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1].isdigit() for row in cells if row[index])
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
