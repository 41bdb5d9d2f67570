"""Rules that a user asks for: their own as `FILE.py:ClassName`, those of the library that are off by default by name.

Nothing is ever looked for by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from enginery.errors import UsageError


def load_rule(text: str) -> Any:
    """An instance of the class: of FILE.py, which is run, or of the library."""
    if text.isidentifier():
        return library_rule(text)
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or path.suffix != ".py" or not path.is_file():
        raise UsageError(
            f"--rule {text!r} names no class of a Python file", "Give FILE.py:ClassName, or a rule of docs/rules.md"
        )
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


def library_rule(name: str) -> Any:
    """A rule of the library that is off by default."""
    from enginery.rewriting.pipeline import check_rule_name, optional_rules  # here: it loads torch

    rules = optional_rules()
    check_rule_name(name, tuple(rules))
    return rules[name]()
