"""linear(c · x, W, b) = linear(x, W·c, b)   for a constant c: a number, or one number per input feature

The weight of an RMS norm is such a c: the norm that is left only divides by the root mean square. All readers of c · x
must be linears with weights of their own. The product is rounded to the weight's dtype once, when weights are bound,
instead of c · x in every step: the same algebra, other roundings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter
from enginery.rewriting.rules.scale_into_linear import in_dtype, require_unshared, scaled, times

aten = torch.ops.aten


class ScaleBeforeLinear(PatternRewriter):
    root_layer = (aten.mul.Tensor, aten.div.Tensor)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, factor = scaled(layer)
        if x is None or x.shape != layer.output.shape:
            return None
        linears = linear_readers(layer.output)
        if not linears:
            return None
        if isinstance(factor, Tensor) and factor.shape not in ((), (1,), (x.shape[-1],)):
            raise MatchFailure(f"{factor.name} is not one number per feature")
        for linear in linears:
            require_unshared(linear.args[1])
        plain = in_dtype(x, linears[0].args[0].dtype)
        return {linear: F.linear(plain, times(layer, linear.args[1], factor), linear.args[2]) for linear in linears}


def linear_readers(x: Tensor) -> list[Layer]:
    """The linears that read x, or x in their own dtype; none if anything else reads it."""
    users = x.users
    if len(users) == 1 and users[0].op is aten.to.dtype and not x.is_output:
        x = users[0].output
        users = x.users
    if x.is_output or any(user.op is not aten.linear.default or user.args[0] is not x for user in users):
        return []
    if any(x in user.args[1:] for user in users):
        return []
    return users


__all__ = ["ScaleBeforeLinear", "linear_readers"]
