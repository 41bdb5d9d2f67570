"""attention(q, repeat(k, n), repeat(v, n)) = attention(q, k, v)   where repeat writes every head n times in a row

Models with fewer key-value heads than query heads often repeat them to the full number first. The operator groups query
heads by itself, so the cache need not hold the copies. The repetition may lie far up, before rotary embedding: it is
traced through operators that treat heads alike, and their calls are made again on the heads that are left.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten


class GroupRepeatedHeads(PatternRewriter):
    pure = True
    root_layer = (ops.attention,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        query, key, value, *rest = layer.args
        heads = key.shape[1]
        for copies in (n for n in range(heads, 1, -1) if heads % n == 0):
            try:
                fewer = [_without_copies(tensor, 1, copies) for tensor in (key, value)]
            except MatchFailure:
                continue
            return ops.attention(query, *fewer, *rest)
        return None


def _without_copies(x: Tensor, axis: int, copies: int) -> Any:
    """A tensor whose elements along the axis, each written `copies` times in a row, are x. MatchFailure if none is."""
    layer = x.parent
    if layer is None:
        raise MatchFailure(f"{x.name} is not computed from repeated heads")
    arguments = layer.arguments
    match layer.op:
        case aten.repeat_interleave.self_int if _axis(layer) == axis and arguments["repeats"] == copies:
            return layer.inputs[0]
        case aten.reshape.default:
            return _through_reshape(layer, axis, copies)
        case aten.transpose.int:
            a, b = (arguments[name] % x.rank for name in ("dim0", "dim1"))
            source = {a: b, b: a}.get(axis, axis)
            return _without_copies(layer.inputs[0], source, copies).transpose(a, b)
        case aten.select.int:
            dim = _axis(layer)
            return _without_copies(layer.inputs[0], axis + (axis >= dim), copies).select(dim, arguments["index"])
        case aten.slice.Tensor if _axis(layer) != axis:
            fewer = _without_copies(layer.inputs[0], axis, copies)
            return fewer.network.call(layer.op, fewer, *layer.args[1:])
        case aten.cat.default if _axis(layer) != axis:
            return torch.cat([_without_copies(part, axis, copies) for part in layer.inputs], arguments["dim"])
    if torch.Tag.pointwise in layer.op.tags or layer.op is aten.to.dtype:
        return _through_pointwise(layer, axis, copies)
    raise MatchFailure(f"{layer.name} may treat heads differently")


def _axis(layer: Layer) -> int:
    return layer.arguments["dim"] % layer.inputs[0].rank


def _through_reshape(layer: Layer, axis: int, copies: int) -> Any:
    """reshape(expand(y[…, g, 1, …]), […, g·n, …]): the copies that a reshape joins to the heads."""
    x, inner = layer.output, layer.inputs[0].parent
    if inner is None or inner.op not in (aten.expand.default, aten.broadcast_to.default):
        raise MatchFailure(f"{layer.name} regroups heads")
    source, wide = inner.inputs[0], inner.output
    joined = (*x.shape[:axis], x.shape[axis] // copies, copies, *x.shape[axis + 1 :])
    if wide.shape != joined or source.rank != wide.rank or source.shape[axis + 1] != 1:
        raise MatchFailure(f"{layer.name} does not join copies")
    if (*source.shape[: axis + 1], copies, *source.shape[axis + 2 :]) != wide.shape:
        raise MatchFailure(f"{inner.name} copies more than heads")
    return source.reshape((*x.shape[:axis], x.shape[axis] // copies, *x.shape[axis + 1 :]))


def _through_pointwise(layer: Layer, axis: int, copies: int) -> Any:
    """Operands that have all the heads lose their copies; those that broadcast over heads stay."""
    x = layer.output

    def fewer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = axis - (x.rank - value.rank)
        if own < 0 or value.shape[own] == 1:
            return value
        return _without_copies(value, own, copies)

    return layer.network.call(layer.op, *map(fewer, layer.args))
