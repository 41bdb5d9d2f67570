"""What was measured of this machine's devices, in files of the cache directory: facts that the next process need not
measure again, and may."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from enginery import env


def path_of(name: str) -> Path:
    return env.cache_dir() / "devices" / f"{name}.json"


def read(path: Path) -> Any:
    """None if there is no such file, or it holds no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, facts: Any) -> None:
    """Atomically. A cache that cannot be written is measured again the next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(facts, file, indent=1)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


__all__ = ["path_of", "read", "write"]
