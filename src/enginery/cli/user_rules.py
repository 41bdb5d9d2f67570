"""Rules of the user's own, named on the command line as `FILE.py:ClassName`. Nothing is ever looked for by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from enginery.errors import UsageError


def load_rule(text: str) -> Any:
    """Runs FILE.py and makes an instance of its class."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or path.suffix != ".py" or not path.is_file():
        raise UsageError(f"--rule {text!r} names no class of a Python file", "Give FILE.py:ClassName")
    spec = importlib.util.spec_from_file_location(f"enginery_user_rules_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"--rule {file} does not load ({line})", f"Try `python {file}`") from error
    rule = getattr(module, name, None)
    if not isinstance(rule, type):
        raise UsageError(f"--rule {file} has no class {name}", "Give FILE.py:ClassName")
    return rule()
