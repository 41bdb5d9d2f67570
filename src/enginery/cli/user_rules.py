"""Rules that a user asks for: their own as `FILE.py:ClassName`, those of the library that are off by default by name.

Nothing is ever looked for by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from enginery.errors import RULE_ERRORS, UsageError, in_one_line


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
    except RULE_ERRORS as error:
        raise UsageError(f"--rule {file} does not load ({in_one_line(error)})", f"Try `python {file}`") from error
    rule = getattr(module, name, None)
    if not isinstance(rule, type):
        raise UsageError(f"--rule {file} has no class {name}", "Give FILE.py:ClassName")
    return instance_of(rule, text)


def instance_of(kind: type, text: str) -> Any:
    """A rule of a user's class; `text` is what names it on the command line."""
    from enginery.rewriting.rule import PatternRewriter  # here: it loads torch

    if not issubclass(kind, PatternRewriter):
        raise UsageError(f"--rule {text} is no rule", "Derive it from enginery.rewriting.PatternRewriter")
    try:
        return kind()
    except RULE_ERRORS as error:
        cause = f"--rule {text}: {kind.__name__}() raised {in_one_line(error)}"
        raise UsageError(cause, "A rule is made without arguments: correct its __init__") from error


def library_rule(name: str) -> Any:
    """A rule of the library that is off by default."""
    from enginery.rewriting.pipeline import check_rule_name, optional_rules  # here: it loads torch

    rules = optional_rules()
    check_rule_name(name, tuple(rules))
    return rules[name]()
