"""JSON from files that nobody vouches for: size, depth and repeated keys are checked before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from enginery.errors import CheckpointError

MAX_BYTES = 8 << 20
MAX_DEPTH = 64

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError that names the file."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes >> 20} MiB, which no such file is")
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str, *, max_depth: int = MAX_DEPTH, unique_keys: bool = False) -> dict[str, Any]:
    """An object from JSON bytes; `source` names them in errors."""
    if depth_exceeds(data, max_depth):
        raise CheckpointError(f"{source}: nested deeper than {max_depth} levels")
    hook = _reject_repeated_keys if unique_keys else None
    try:
        value = json.loads(data, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: a JSON object is expected, not {type(value).__name__}")
    return value


def depth_exceeds(data: bytes, limit: int) -> bool:
    """Whether brackets nest deeper than `limit`, found without recursion."""
    depth = 0
    for token in _STRUCTURE.finditer(data):
        first = data[token.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key[:80]!r} stands twice")
        found[key] = value
    return found
