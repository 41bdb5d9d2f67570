"""Floating-point operations of a layer: one table.

Products count two per multiply-add and nothing for a bias, as `torch.utils.flop_counter` does; causal attention counts
the pairs that its mask and window leave. Everything else counts one per element and elementary operation, which is
for orientation: such layers are bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch

from enginery.analysis.layout import Layout
from enginery.analysis.step import Step, visible_pairs
from enginery.network.kind import LayerKind, kind_of
from enginery.network.layer import Layer
from enginery.network.operator import Operator, signature

Rule = Callable[[Layer, Layout, Step], int]

SOFTMAX = 5
"""per element: maximum, subtract, exponential, sum, divide"""
NORMALIZATION = 7
"""per element: mean, subtract, square, sum, scale, weight, bias"""
ADD_RMS_NORM = 5
"""per element: add, square, sum, scale, weight"""


def flops(layer: Layer, layout: Layout, step: Step) -> int | None:
    """None: the operator has no rule."""
    rule = _rule(layer.op)
    return None if rule is None else rule(layer, layout, step)


def has_rule(op: Operator) -> bool:
    return _rule(op) is not None


def is_product(op: Operator) -> bool:
    """It multiplies matrices, on the units whose speed depends on the dtype."""
    return signature(op).short_name in _PRODUCTS


@cache
def _rule(op: Operator) -> Rule | None:
    named = _PRODUCTS.get(signature(op).short_name) or _OTHERS.get(signature(op).short_name)
    if named is not None:
        return named
    if op.namespace == "aten" and torch.Tag.pointwise in op.tags:
        return _per_output
    return _BY_KIND.get(kind_of(op))


def _per_output(layer: Layer, layout: Layout, step: Step) -> int:
    return sum(map(layout.numel, layer.outputs))


def _per_input(factor: int) -> Rule:
    return lambda layer, layout, step: factor * layout.numel(layer.inputs[0])


def _nothing(layer: Layer, layout: Layout, step: Step) -> int:
    return 0


def _product(operand: int) -> Rule:
    """[..., K] · [K, N], with the left one among the tensors of the call."""
    return lambda layer, layout, step: 2 * layout.numel(layer.outputs[0]) * layout.shape(layer.inputs[operand])[-1]


def _convolution(layer: Layer, layout: Layout, step: Step) -> int:
    """Each output is a sum over the channels of its group and the kernel; transposed, each input goes to as many."""
    source, weight = layer.inputs[:2]
    transposed = layer.arguments.get("transposed", "transpose" in signature(layer.op).short_name)
    each = math.prod(layout.shape(weight)[1:])
    return 2 * layout.numel(source if transposed else layer.outputs[0]) * each


def _einsum(layer: Layer, layout: Layout, step: Step) -> int:
    """Operands are contracted from left to right, as torch does."""
    left, arrow, right = layer.arguments["equation"].replace(" ", "").partition("->")
    shapes = [layout.shape(tensor) for tensor in layer.inputs]
    terms = [_labels(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    kept = {label for label in sizes if label[:3] in right} if arrow else _implied(terms)
    held, total = set(terms[0]), 0 if len(terms) > 1 else math.prod(sizes.values())
    for i, term in enumerate(terms[1:], 2):
        total += 2 * math.prod(sizes[label] for label in held | set(term))
        held = (held | set(term)) & kept.union(*terms[i:])
    return total


def _labels(term: str, rank: int) -> list[str]:
    """One label a dimension; those of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]


def _implied(terms: list[list[str]]) -> set[str]:
    flat = [label for term in terms for label in term]
    return {label for label in flat if label.startswith("...") or flat.count(label) == 1}


def _dense_attention(layer: Layer, layout: Layout, step: Step) -> int:
    """query [..., T, Dk], key [..., S, Dk], value [..., S, Dv]; a mask that is a tensor leaves every pair."""
    query, key, value = (layout.shape(tensor) for tensor in layer.inputs[:3])
    pairs = visible_pairs(query[-2], 0, None) if layer.arguments["is_causal"] else query[-2] * key[-2]
    return 2 * math.prod(query[:-2]) * pairs * (query[-1] + value[-1])


def _attention(layer: Layer, layout: Layout, step: Step) -> int:
    """One packed sequence: query [T, Hq, Dk], value [T, Hkv, Dv]."""
    tokens, heads, size = layout.shape(layer.arguments["query"])
    window = layer.arguments["window"]
    future = 0 if layer.arguments["causal"] else tokens * (tokens - 1) // 2
    pairs = visible_pairs(tokens, 0, window) + future
    return 2 * heads * pairs * (size + layout.shape(layer.arguments["value"])[-1])


def _paged_attention(layer: Layer, layout: Layout, step: Step) -> int:
    _, heads, size = layout.shape(layer.arguments["query"])
    window = layer.arguments["window"]
    pairs = sum(count * visible_pairs(queries, step.context, window) for count, queries in step.queries())
    return 2 * heads * pairs * (size + layout.shape(layer.arguments["value"])[-1])


def _gpt_attention(layer: Layer, layout: Layout, step: Step) -> int:
    *rows, tokens, _ = layout.shape(layer.arguments["qkv"])
    width = layer.arguments["num_heads"] * layer.arguments["head_size"]
    return 4 * math.prod(rows) * visible_pairs(tokens, 0, None) * width


def _norm_linear(layer: Layer, layout: Layout, step: Step) -> int:
    """input [..., K], weight [N, K]: the product, add_rms_norm, and silu_mul if it is gated."""
    elements = layout.numel(layer.inputs[0])
    features, depth = layout.shape(layer.arguments["weight"])
    gate = elements // depth * features if layer.arguments["gated"] else 0
    return 2 * elements * features + ADD_RMS_NORM * elements + gate


_PRODUCTS: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(("linear", "packed_linear", "expert_linear"), _product(0)),
        "norm_linear": _norm_linear,
        **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot"), _product(0)),
        **dict.fromkeys(("addmm", "addmv", "baddbmm"), _product(1)),
        **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
        "einsum": _einsum,
        "scaled_dot_product_attention": _dense_attention,
        "attention": _attention,
        **dict.fromkeys(("paged_attention", "rotary_paged_attention"), _paged_attention),
        "gpt_attention": _gpt_attention,
    }
)
_OTHERS: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), _per_input(1)),
        **dict.fromkeys(("greatest", "silu_mul"), _per_input(1)),
        "add_rms_norm": _per_input(ADD_RMS_NORM),
    }
)
_BY_KIND: Mapping[LayerKind, Rule] = MappingProxyType(
    {
        LayerKind.SOFTMAX: _per_input(SOFTMAX),
        LayerKind.NORMALIZATION: _per_input(NORMALIZATION),
        **dict.fromkeys((LayerKind.REDUCE, LayerKind.TOPK), _per_input(1)),
        **dict.fromkeys((LayerKind.ELEMENTWISE, LayerKind.UNARY, LayerKind.ACTIVATION), _per_output),
        **dict.fromkeys(
            (
                LayerKind.CAST, LayerKind.CONCATENATION, LayerKind.FILL, LayerKind.GATHER, LayerKind.IDENTITY,
                LayerKind.PADDING, LayerKind.SCATTER, LayerKind.SELECT, LayerKind.SHUFFLE, LayerKind.SLICE,
            ),
            _nothing,
        ),
    }
)  # fmt: skip
"""Kinds that only move data cost no FLOPs. A kind that is not here has no rule."""
