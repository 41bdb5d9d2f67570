"""What an author writes: a rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from enginery.network.layer import Layer
from enginery.rewriting.matcher import Constraint
from enginery.rewriting.pattern import Pattern


class MatchFailure(Exception):
    """Raised by `check`, `rewrite` or `match_and_rewrite` to decline. The reason is counted in the report."""


class PatternRewriter:
    """A rewrite rule, in one of three forms.

    Declarative: `pattern`, an optional `check(captures…)`, and `rewrite(captures…)`. Captures arrive by
    parameter name; so do `root` (the matched layer), `network` and `args` (given to `manager.rewrite(args=…)`).
    Imperative: `root_layer` (kinds or operators; None: every layer) and `match_and_rewrite(layer)`.
    Split: `root_layer`, `match(layer) -> bool` and `rewrite(layer)`, the second only where the first is true.

    `rewrite` and `match_and_rewrite` return what replaces the root: a Tensor; a tuple, one entry per output (None where
    nobody reads it), or one entry per root of a pattern with several; or `{layer or tensor: replacement}`; or None to
    decline. PyTorch on Tensors in their body appends layers at the root. Nothing else of a network may be
    changed there.
    """

    pattern: Pattern | Sequence[Pattern] | None = None
    """several roots: a tuple; each further root uses a value of the first"""
    where: Sequence[Constraint] = ()
    """relations between captures, such as `same_dtype("x", "y")`"""
    root_layer: Collection[Any] | None = None
    benefit: int = 0
    """rules of higher benefit are tried first at a layer; equal ones in the order in which they were added"""
    expect: int | str | None = None
    """how often the rule must apply in a phase: a number, or "each layer": once in every repeated module"""
    changes_shape: bool = False
    changes_dtype: bool = False
    """the replacement may have another shape or dtype than what it replaces"""
    removes_effects: bool = False
    """the rule may remove calls that write to an argument or draw random numbers"""
    pure: bool = False
    """its code keeps no state and depends on nothing but what it reads of layers and tensors (by isinstance, not type):
    of equal blocks, such as decoder layers, it is asked in one, and its answer is repeated in the others"""
    args: Mapping[str, Any] = {}
    """the rule's own arguments; those of `manager.rewrite(args=…)` are laid over them"""

    def match(self, layer: Layer) -> bool:
        raise NotImplementedError

    def match_and_rewrite(self, layer: Layer) -> Any:
        raise NotImplementedError

    def rewrite(self, *captures: Any) -> Any:
        raise NotImplementedError

    def check(self) -> bool | None:
        """False, or MatchFailure with a reason, declines. May take captures by name."""
        return True

    def __repr__(self) -> str:
        return f"<rule {type(self).__name__}>"
