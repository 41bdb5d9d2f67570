"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIXES = tuple((10.0 ** (3 * power), prefix) for power, prefix in zip(range(5, -5, -1), "PTGMk mµnp", strict=True))


def si(value: float, unit: str = "") -> str:
    """Three digits with a decimal prefix: `15.0 GB`, `812 µs`, `0 B`."""
    scale, prefix = next((pair for pair in _PREFIXES if abs(value) >= 0.9995 * pair[0]), (1.0, " "))
    number = value / scale
    decimals = 0 if number >= 99.95 or (scale == 1.0 and value == int(value)) else 1 if number >= 9.995 else 2
    return f"{number:.{decimals}f} {prefix.strip()}{unit}".rstrip()


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2, gaps: bool = False) -> list[str]:
    """Aligned lines; the first `left` columns to the left, the others to the right. `gaps`: a blank line before
    titles in between, which are rows with nothing but their first cell.
    """
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    lines = []
    for row in (titles, *rows):
        is_title = gaps and not any(row[1:])
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines += ["", row[0]] if is_title else ["  ".join(cells).rstrip()]
    return lines
