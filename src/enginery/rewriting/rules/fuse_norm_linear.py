"""linear(add_rms_norm(x, r, w, ε)₀, W, b, t) = norm_linear(x, r, w, ε, W, b, t)₀   for `enginery::linear`

Between two linears of a decoder layer nothing is left that is small: the sum, too, is an output of the operator, which
the residual stream goes on with. The gate goes the same way, once `FuseSiluMul` has made it one call.
"""

from __future__ import annotations

from typing import Any

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.network.operator import Operator
from enginery.rewriting.rule import MatchFailure, PatternRewriter


class FuseNormLinear(PatternRewriter):
    root_layer = (ops.linear,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        normed, *weights = layer.args
        norm = _sole_source(normed, ops.add_rms_norm)
        output, total = ops.norm_linear(*norm.args, *weights)
        return {layer: output, norm.outputs[1]: total}


class FuseGate(PatternRewriter):
    """silu_mul(norm_linear(x, r, w, ε, W, b, t)₀) = norm_linear(x, r, w, ε, W, b, t, gated)₀"""

    root_layer = (ops.silu_mul,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        (joined,) = layer.args
        linear = _sole_source(joined, ops.norm_linear)
        if linear.arguments["gated"]:
            raise MatchFailure("the linear is gated already")
        output, total = linear.replace(gated=True)
        return {layer: output, linear.outputs[1]: total}


def _sole_source(value: Tensor, op: Operator) -> Layer:
    """The call of `op` whose first output the value is, if nothing else reads it."""
    source = value.parent
    if source is None or source.op is not op or value is not source.outputs[0]:
        raise MatchFailure(f"its input is not the first output of {op._opname}")
    if len(value.users) > 1 or value.is_output:
        raise MatchFailure("its input is read by others, too")
    return source


__all__ = ["FuseGate", "FuseNormLinear"]
