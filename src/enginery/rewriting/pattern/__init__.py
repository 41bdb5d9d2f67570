"""Patterns: PyTorch over pattern values is a pattern.

    Var("x") * F.silu(Var("g"))                                  # operands in either order
    F.linear(Var("x"), Const("w"), Optional(Const("b")))         # with a bias or without: b is None then
    torch.ops.aten.rms_norm(Var("x"), ..., eps=Scalar("eps"))    # `...`: the rest may be anything
    torch.cat(Vars("parts"), dim=-1)                             # parts is the list
    OneOf(F.silu(Var("x")), F.gelu(Var("x")))                    # the first that matches

A pattern stands for one value of a network. It is built once, when a rule's class is defined, and compiled by
`matcher.py`. Functions that torch implements in C check their arguments before a pattern sees them: where they refuse
`...`, a `Scalar` or an `Optional`, write `Call(F.linear, Var("x"), Const("w"), ...)` or the operator itself,
`torch.ops.aten.linear(Var("x"), Const("w"), ...)`.
"""

from __future__ import annotations

from enginery.rewriting.pattern.call import (
    ESCAPES,
    Anything,
    Call,
    Items,
    Literal,
    Output,
    Pattern,
    names_in,
    pattern_of,
    users_of,
)
from enginery.rewriting.pattern.chain import Chain
from enginery.rewriting.pattern.choice import AnyOp, OneOf, Optional, Through
from enginery.rewriting.pattern.variable import Const, Scalar, Var, Vars

__all__ = [
    "ESCAPES", "AnyOp", "Anything", "Call", "Chain", "Const", "Items", "Literal", "OneOf", "Optional", "Output",
    "Pattern", "Scalar", "Through", "Var", "Vars", "names_in", "pattern_of", "users_of",
]  # fmt: skip
