"""f(transpose(x, a, b), y) = transpose(f(x, transpose(y, a, b)), a, b)   for an f that works element by element

Transposes move down, over rotary embedding, until they meet the one that attention puts before its operands: both go.
Query and key then reach attention in the layout that the projection wrote, tokens first, and need no copy. Operands
that broadcast are transposed instead, which moves no data. Slices, splits, concatenations, stacks behind the exchanged
axes, and reshapes of what follows them let transposes through as well.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten

ALONG_ONE_AXIS = (
    aten.slice.Tensor, aten.cat.default, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip


class SinkTransposes(PatternRewriter):
    pure = True
    root_layer = None

    def match_and_rewrite(self, layer: Layer) -> Any:
        tensors = layer.inputs
        if not tensors or layer.is_constant:
            return None
        if layer.op is aten.reshape.default:
            return _over_reshape(layer)
        if layer.op in ALONG_ONE_AXIS or layer.op is aten.stack.default:
            axes = _common_axes(tensors)
            return None if axes is None else _over_one_axis(layer, *axes)
        if torch.Tag.pointwise in layer.op.tags or layer.op is aten.to.dtype:
            return _over_pointwise(layer)
        return None


class TransposeOfUnsqueeze(PatternRewriter):
    """transpose(unsqueeze(x, a), a, a ± 1) = unsqueeze(x, a ± 1)"""

    pure = True
    root_layer = (aten.transpose.int,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, a, b = layer.args
        inner = x.parent
        if inner is None or inner.op is not aten.unsqueeze.default or abs(a % x.rank - b % x.rank) != 1:
            return None
        source, place = inner.args
        places = {a % x.rank: b % x.rank, b % x.rank: a % x.rank}
        place = places.get(place % x.rank)
        return None if place is None else source.unsqueeze(place)


def _over_pointwise(layer: Layer) -> Any:
    output = layer.output
    axes = _common_axes([tensor for tensor in layer.inputs if tensor.shape == output.shape])
    # an operand of lower rank has no such axes; it may stay as it is if it ends before them
    if axes is None or any(tensor.rank < output.rank <= tensor.rank + axes[1] for tensor in layer.inputs):
        return None
    args = [_exchanged(value, output.rank, *axes) for value in layer.args]
    return _call(layer, args).transpose(*axes)


def _over_one_axis(layer: Layer, a: int, b: int) -> Any:
    dim = layer.arguments["dim"]
    if dim is None:
        return None
    dim %= layer.outputs[0].rank
    if layer.op is aten.stack.default and dim <= b:
        return None
    place = list(layer.arguments).index("dim")
    args = [_exchanged(value, layer.inputs[0].rank, a, b) for value in layer.args]
    args[place] = {a: b, b: a}.get(dim, dim)
    result = _call(layer, args)
    return result.transpose(a, b) if isinstance(result, Tensor) else tuple(part.transpose(a, b) for part in result)


def _over_reshape(layer: Layer) -> Any:
    x, shape = layer.inputs[0], list(layer.output.shape)
    axes = _axes(x)
    if axes is None or x.shape[: axes[1] + 1] != tuple(shape[: axes[1] + 1]):
        return None
    a, b = axes
    shape[a], shape[b] = shape[b], shape[a]
    return _source(x).reshape(shape).transpose(a, b)


def _common_axes(tensors: list[Tensor]) -> tuple[int, int] | None:
    """The axes that all of them exchange, if they all do."""
    found = {_axes(tensor) for tensor in tensors}
    return found.pop() if len(found) == 1 else None


def _axes(tensor: Tensor) -> tuple[int, int] | None:
    layer = tensor.parent
    if layer is None or layer.op is not aten.transpose.int:
        return None
    a, b = sorted(axis % tensor.rank for axis in layer.args[1:])
    return a, b


def _source(tensor: Tensor) -> Any:
    assert tensor.parent is not None  # noqa: S101  (it has axes)
    return tensor.parent.args[0]


def _exchanged(value: Any, rank: int, a: int, b: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_exchanged(item, rank, a, b) for item in value)
    if not isinstance(value, Tensor) or value.rank < rank:
        return value
    return _source(value) if _axes(value) == (a, b) else value.transpose(a, b)


def _call(layer: Layer, args: list[Any]) -> Any:
    return layer.network.call(layer.op, *args)
