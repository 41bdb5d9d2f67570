"""linear(x, W, b) = enginery::linear(x, W/t, b, t)   with t = max|W|/448 of each output

Approximate on purpose: W/t is rounded to float8_e4m3fn, once, when weights are bound. A kernel that multiplies 8-bit
floats rounds its input too, each row x by a scale max|x|/448 of its own, in every step (`enginery.ops.linear`); the
network says nothing of that.

The head, whose rounding would go straight into the logits, and the routers of a mixture of experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.ops.precision import FLOAT8, LARGEST, MULTIPLE, SMALLEST_MAXIMUM
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten

ROUTER_REACH = 8
"""calls between a router and the choice of experts, at most"""
PRODUCTS = (aten.linear.default, ops.linear, ops.expert_linear, ops.attention)


class QuantiseLinears(PatternRewriter):
    root_layer = (aten.linear.default,)

    def __init__(self, *, per_channel: bool = True) -> None:
        """With `per_channel` a weight has a scale for each output, else one for all."""
        self.per_channel = per_channel

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, weight, bias = layer.args
        _require_fit(layer)
        narrow, scale = quantise(weight, (1,) if self.per_channel else (0, 1))
        return ops.linear(x, narrow, bias, scale)


def quantise(weight: Any, dims: tuple[int, ...]) -> tuple[Any, Any]:
    """(q, s) with weight `[N, K]` ≈ q·s: q is float8, s float32 `[N]`, or `[1]` if `dims`, which share it, are both."""
    maximum = weight.abs().amax(dims, keepdim=True).to(torch.float32)
    scale = maximum.clamp_min(SMALLEST_MAXIMUM) / LARGEST
    return (weight.to(torch.float32) / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale.squeeze(1)


def _require_fit(layer: Layer) -> None:
    x, weight, _ = layer.args
    if not weight.is_constant or weight.rank != 2 or x.is_constant:
        raise MatchFailure("its weight is no constant matrix")
    if not x.dtype == weight.dtype or not weight.dtype.is_floating_point or weight.dtype.itemsize not in (2, 4):
        raise MatchFailure(f"its operands are {x.dtype} and {weight.dtype}")
    if any(not isinstance(size, int) or size % MULTIPLE for size in weight.shape):
        raise MatchFailure(f"a side of its weight is no multiple of {MULTIPLE}")
    if layer in _heads(layer.network.outputs):
        raise MatchFailure("its product becomes the logits")
    if any(user.op is aten.topk.default for user in _followers(layer)):
        raise MatchFailure("its product chooses experts")


def _heads(outputs: tuple[Tensor, ...]) -> Iterator[Layer]:
    """The last products before the outputs of a network."""
    pending, seen = [tensor.parent for tensor in outputs], set()
    while pending:
        layer = pending.pop()
        if layer is None or layer in seen:
            continue
        seen.add(layer)
        if layer.op in PRODUCTS:
            yield layer
        else:
            pending += [tensor.parent for tensor in layer.inputs]


def _followers(layer: Layer) -> Iterator[Layer]:
    """The calls that read the layer's value, and what comes of it, before the next product."""
    front, seen = [layer], {layer}
    for _ in range(ROUTER_REACH):
        readers = {user: None for one in front for output in one.outputs for user in output.users}
        front = [user for user in readers if user not in seen and user.op not in PRODUCTS]
        seen.update(front)
        yield from front
