"""Shape functions: for each common operator, the shapes and dtypes of its outputs from those of its inputs.

A rule takes the arguments of a call in normal form and gives one `(shape, dtype)` per output. It costs about a
microsecond where torch's own shape propagation (FakeTensor) costs a few hundred; `tests/network/test_types.py` holds
the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from enginery.network.operator import Operator
from enginery.network.shapes import creation, elementwise, indexing, matmul, own, reductions, views
from enginery.network.shapes.sizes import Rule, Types

RULES: Mapping[Operator, Rule] = MappingProxyType(
    {
        **elementwise.RULES,
        **views.RULES,
        **indexing.RULES,
        **matmul.RULES,
        **reductions.RULES,
        **creation.RULES,
        **own.RULES,
    }
)

__all__ = ["RULES", "Rule", "Types"]
