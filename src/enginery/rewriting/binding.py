"""A rule made ready to run: its form recognised, its pattern compiled, its parameters tied to captures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch

from enginery.errors import EngineryError, RewriteError, UsageError
from enginery.network.layer import Layer
from enginery.network.operator import Operator
from enginery.rewriting.attributes import check_attributes, check_is_rule
from enginery.rewriting.matcher import ARGS, NETWORK, ROOT, Matcher, Registers
from enginery.rewriting.pattern import Pattern
from enginery.rewriting.rule import PatternRewriter

Action = Callable[[Registers], Any]

_FIXED = {"root": ROOT, "network": NETWORK, "args": ARGS}


@dataclass(slots=True, eq=False)
class Way:
    """One way to enter a rule: from one of the roots of its pattern, or from a layer that an imperative rule
    asked for.
    """

    rule: BoundRule
    matcher: Matcher | None
    check: Action | None
    rewrite: Action

    def accepts(self, layer: Layer) -> bool:
        if self.matcher is not None:
            return self.matcher.ops is None or layer.op in self.matcher.ops
        return accepts_root(layer, self.rule.roots)


@dataclass(slots=True, eq=False)
class BoundRule:
    label: str
    source: Any
    benefit: int = 0
    args: dict[str, Any] = field(default_factory=dict)
    ways: list[Way] = field(default_factory=list)
    roots: tuple[Any, ...] | None = None

    @property
    def location(self) -> str:
        """file:line of the rule's rewrite, or of its class."""
        source = type(self.source)
        for name in ("rewrite", "match_and_rewrite"):
            if _overrides(self.source, name):
                code = getattr(inspect.unwrap(getattr(self.source, name)), "__code__", None)
                return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "?"
        try:
            return f"{inspect.getfile(source)}:{inspect.getsourcelines(source)[1]}"
        except (OSError, TypeError):
            return "?"

    @property
    def height(self) -> int:
        """How far below its root the rule looks, in calls."""
        return max((way.matcher.height for way in self.ways if way.matcher is not None), default=1)


def bind(label: str, rule: Any, benefit: int | None = None) -> BoundRule:
    """Raises UsageError for what is no rule, and RewriteError, naming the rule, if it cannot run."""
    check_is_rule(rule)
    bound = BoundRule(label, rule)
    try:
        check_attributes(rule)
        bound.benefit, bound.args = rule.benefit if benefit is None else benefit, dict(rule.args or {})
        if rule.pattern is not None:
            bound.ways = _declarative(bound, rule)
        else:
            bound.ways = [_imperative(bound, rule)]
    except EngineryError as error:
        raise RewriteError(f"rule {label}: {error.cause} ({bound.location})", error.fix, rule=label) from error
    return bound


def _declarative(bound: BoundRule, rule: Any) -> list[Way]:
    roots = rule.pattern if isinstance(rule.pattern, (tuple, list)) else (rule.pattern,)
    if not roots or not all(isinstance(root, Pattern) for root in roots):
        raise UsageError("its pattern is no pattern", "Call PyTorch on Var and Const")
    if not _overrides(rule, "rewrite"):
        raise UsageError("it has a pattern but no rewrite", "Define rewrite(captures...)")
    outermost = [
        i for i, root in enumerate(roots) if not any(root is not other and _inside(root, other) for other in roots)
    ]
    ways = []
    for anchor in outermost:
        matcher = Matcher(roots, tuple(rule.where), anchor)
        check = tie(rule.check, matcher.names) if _overrides(rule, "check") else None
        ways.append(Way(bound, matcher, check, tie(rule.rewrite, matcher.names)))
    return ways


def _imperative(bound: BoundRule, rule: Any) -> Way:
    bound.roots = None if rule.root_layer is None else _wanted(rule.root_layer)
    if _overrides(rule, "match_and_rewrite"):
        function = rule.match_and_rewrite
        return Way(bound, None, None, lambda registers: function(registers[ROOT]))
    if _overrides(rule, "match") and _overrides(rule, "rewrite"):
        match, rewrite = rule.match, rule.rewrite
        return Way(bound, None, lambda registers: match(registers[ROOT]), lambda registers: rewrite(registers[ROOT]))
    raise UsageError("it has no pattern and no match_and_rewrite", "Define pattern and rewrite, or match_and_rewrite")


def _overrides(rule: Any, name: str) -> bool:
    return getattr(type(rule), name, None) is not getattr(PatternRewriter, name) or name in vars(rule)


def _inside(node: Pattern, other: Pattern) -> bool:
    return node is other or any(_inside(node, child) for child in other.children())


def tie(function: Callable, names: Mapping[str, int]) -> Action:
    """Calls `function` with the captures that its parameters name."""
    slots, keywords = [], {}
    for parameter in inspect.signature(function).parameters.values():
        slot = names.get(parameter.name, _FIXED.get(parameter.name))
        if parameter.kind is parameter.VAR_KEYWORD:
            keywords.update({name: slot for name, slot in names.items() if name not in keywords})
        elif slot is None:
            if parameter.default is parameter.empty:
                known = ", ".join([*names, *_FIXED])
                raise UsageError(
                    f"{function.__name__} asks for {parameter.name!r}, which the pattern does not bind",
                    f"It binds: {known}",
                )
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = slot
        else:
            slots.append(slot)
            keywords.setdefault(parameter.name, slot)
    positional = tuple(slots)
    keywords = {name: slot for name, slot in keywords.items() if slot not in positional}
    if keywords:
        return lambda registers: function(
            *[registers[slot] for slot in positional], **{name: registers[slot] for name, slot in keywords.items()}
        )
    if not positional:
        return lambda registers: function()
    if len(positional) == 1:
        (only,) = positional
        return lambda registers: function(registers[only])
    pick = itemgetter(*positional)
    return lambda registers: function(*pick(registers))


def accepts_root(layer: Layer, roots: Any) -> bool:
    """`roots`: kinds of layers, operators, packets of operators or their names; None: any layer."""
    return roots is None or any(_is_of(layer, wanted) for wanted in roots)


def _wanted(roots: Any) -> tuple[Any, ...]:
    return (roots,) if isinstance(roots, str) or not isinstance(roots, Collection) else tuple(roots)


def _is_of(layer: Layer, wanted: Any) -> bool:
    if isinstance(wanted, Operator):
        return layer.op is wanted
    if isinstance(wanted, torch._ops.OpOverloadPacket):
        return layer.op.overloadpacket is wanted
    if isinstance(wanted, str):
        return layer.op._schema.name.replace("::", ".") == wanted
    return layer.kind == wanted
