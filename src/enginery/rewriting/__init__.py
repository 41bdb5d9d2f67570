"""Rewriting networks by rules. `docs/rewriting.md` is the contract, `docs/add_a_rule.md` the way in."""

from __future__ import annotations

from enginery.rewriting.analysis import Analysis, AnalysisPatternManager, PatternAnalyzer
from enginery.rewriting.constraints import (
    Relation,
    has_dtype,
    has_rank,
    holds,
    is_static,
    same_dtype,
    same_shape,
    same_size,
    same_type,
)
from enginery.rewriting.explain import Miss, explain
from enginery.rewriting.manager import RewritePatternManager
from enginery.rewriting.pattern import AnyOp, Call, Chain, Const, OneOf, Optional, Pattern, Scalar, Through, Var, Vars
from enginery.rewriting.report import Application, Report, RuleReport
from enginery.rewriting.rule import MatchFailure, PatternRewriter

__all__ = [
    "Analysis", "AnalysisPatternManager", "AnyOp", "Application", "Call", "Chain", "Const", "MatchFailure", "Miss",
    "OneOf", "Optional", "Pattern", "PatternAnalyzer", "PatternRewriter", "Relation", "Report",
    "RewritePatternManager", "RuleReport", "Scalar", "Through", "Var", "Vars", "explain", "has_dtype", "has_rank",
    "holds", "is_static", "same_dtype", "same_shape", "same_size", "same_type",
]  # fmt: skip
