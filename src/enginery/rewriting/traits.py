"""What rewriting knows of operators beyond their schema."""

from __future__ import annotations

import torch

from enginery.network.operator import Operator

_aten = torch.ops.aten

COMMUTATIVE: frozenset[Operator] = frozenset(
    {
        _aten.add.Tensor, _aten.mul.Tensor, _aten.maximum.default, _aten.minimum.default,
        _aten.logical_and.default, _aten.logical_or.default, _aten.logical_xor.default,
        _aten.bitwise_and.Tensor, _aten.bitwise_or.Tensor, _aten.bitwise_xor.Tensor,
    }
)  # fmt: skip
"""Operators whose first two arguments may be exchanged, and nested calls of them be bracketed in any way.
(`add` with an alpha other than 1 is not: the default that a pattern leaves in place says so.)"""

TRANSPARENT: frozenset[str] = frozenset(
    f"aten::{name}"
    for name in (
        "alias", "clone", "contiguous", "detach", "expand", "flatten", "reshape", "squeeze", "to", "_to_copy",
        "type_as", "_unsafe_view", "unsqueeze", "view", "view_as",
    )
)  # fmt: skip
"""Calls that keep every element and their order, as long as the number of elements stays; by name without the
overload.
"""
