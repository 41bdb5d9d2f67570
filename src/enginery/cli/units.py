"""Human integers on the command line: `32k` tokens, `4GiB` of memory."""

from __future__ import annotations

import re

from enginery.errors import UsageError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NUMBER = re.compile(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kKmMgGtT]?)(i?)([bB]?)\s*", re.ASCII)


def parse_count(text: str, flag: str) -> int:
    """`4096`, `4k` (4,000), `4K` (4,096): lower case counts in thousands, upper case in powers of two."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[4] or match[2].lower() == "t":
        raise UsageError(f"{flag} {text!r} is not a count", "Give an integer such as 4096, 4k (4,000) or 4K (4,096)")
    binary = match[2].isupper() or bool(match[3])
    return round(float(match[1]) * (_BINARY if binary else _DECIMAL)[match[2].lower()])


def parse_bytes(text: str, flag: str) -> int:
    """`1GiB`, `1G` and `1g` are 2³⁰ bytes, `1GB` is 10⁹."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"{flag} {text!r} is not a size", "Give bytes such as 8GiB, 500MB or 1073741824")
    decimal = bool(match[4]) and not match[3]
    table = {**_DECIMAL, "t": 10**12} if decimal else _BINARY
    return round(float(match[1]) * table[match[2].lower()])


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
