"""What a rule must be, whatever network it meets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from enginery.errors import UsageError
from enginery.rewriting.rule import PatternRewriter


def check_is_rule(value: Any) -> None:
    """Raises UsageError for what is no instance of a rule."""
    if isinstance(value, PatternRewriter):
        return
    if isinstance(value, type) and issubclass(value, PatternRewriter):
        raise UsageError(f"{value.__name__} is a class", f"Give a rule made of it, {value.__name__}()")
    raise UsageError(
        f"an object of class {type(value).__name__} is no rule",
        "Derive the class from enginery.rewriting.PatternRewriter",
    )


def check_attributes(rule: PatternRewriter) -> None:
    """Raises UsageError for the first attribute that no rule can have."""
    for name, (is_right, cause, fix) in _CHECKS.items():
        if not is_right(getattr(rule, name)):
            raise UsageError(f"its {name} is {cause}", fix)


def _is_count(value: Any) -> bool:
    return value is None or value == "each layer" or type(value) is int


def _are_constraints(value: Any) -> bool:
    return isinstance(value, Collection) and all(hasattr(item, "holds") for item in value)


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = MappingProxyType(
    {
        "benefit": (lambda value: isinstance(value, int), "no whole number", "Write benefit = 1; higher ones go first"),
        "expect": (_is_count, "no count", 'Give a whole number, or "each layer"'),
        "where": (_are_constraints, "no list of constraints", 'Write where = [same_dtype("x", "y")]'),
        "args": (
            lambda value: value is None or isinstance(value, Mapping),
            "no mapping",
            'Write args = {"name": value}',
        ),
    }
)

__all__ = ["check_attributes", "check_is_rule"]
