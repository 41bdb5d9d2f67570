"""Bytes that a layer reads and writes, by tensor.

A layer reads each value once, as a kernel with a perfect cache would. A view moves nothing itself; who reads it reads
its part of the value that it lies in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from enginery.analysis.cost import Cost
from enginery.analysis.layout import Layout
from enginery.analysis.step import Step, visible_keys
from enginery.network.kind import LayerKind
from enginery.network.layer import Layer
from enginery.network.operator import signature
from enginery.network.tensor import Tensor

Rule = Callable[[Layer, Layout, Step], "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes read of and written to each value, and to the KV pools."""

    reads: Mapping[Tensor, int] = field(default_factory=dict)
    writes: Mapping[Tensor, int] = field(default_factory=dict)
    kv_reads: int = 0
    kv_writes: int = 0

    def cost(self, flops: int, layout: Layout, known: Collection[Tensor]) -> Cost:
        """`known`: the values that are there before the step. What is read as a whole is not read again in parts."""
        read: Counter[Tensor] = Counter()
        for tensor, count in self.reads.items():
            if not any(whole in self.reads for whole in layout.ancestors(tensor)):
                read[layout.base(tensor)] += count
        read = Counter({tensor: min(count, layout.nbytes(tensor)) for tensor, count in read.items()})
        weights = sum(count for tensor, count in read.items() if tensor in known)
        return Cost(flops, weights, read.total() - weights, sum(self.writes.values()), self.kv_reads, self.kv_writes)


def traffic(layer: Layer, layout: Layout, step: Step) -> Traffic:
    if layout.is_view(layer):
        return Traffic()
    rule = _RULES.get(signature(layer.op).short_name)
    if rule is not None:
        return rule(layer, layout, step)
    if layer.kind is LayerKind.FILL:
        return Traffic({}, _written(layer, layout))
    return Traffic(_read(layer.inputs, layout), _written(layer, layout))


def _read(tensors: Collection[Tensor], layout: Layout) -> dict[Tensor, int]:
    return {tensor: layout.nbytes(tensor) for tensor in tensors}


def _written(layer: Layer, layout: Layout) -> dict[Tensor, int]:
    return {output: layout.nbytes(output) for output in layer.outputs if layout.base(output) is output}


def _gather(source: str) -> Rule:
    """Of the source only the elements that are picked; the indices whole."""

    def rule(layer: Layer, layout: Layout, step: Step) -> Traffic:
        table = layer.arguments[source]
        reads = _read([tensor for tensor in layer.inputs if tensor is not table], layout)
        picked = layout.numel(layer.outputs[0]) * table.dtype.itemsize
        reads[table] = min(picked, layout.nbytes(table))
        return Traffic(reads, _written(layer, layout))

    return rule


def _copy(layer: Layer, layout: Layout, step: Step) -> Traffic:
    """The former content is overwritten unseen."""
    return Traffic(_read([layer.arguments["src"]], layout), _written(layer, layout))


def _nothing(layer: Layer, layout: Layout, step: Step) -> Traffic:
    return Traffic()


def _expert_linear(layer: Layer, layout: Layout, step: Step) -> Traffic:
    """Weights and biases of the active experts alone, if tokens choose evenly: E · (1 − (1 − k / E) ^ T) of E experts
    with k for each of T tokens.
    """
    experts = layout.shape(layer.arguments["weight"])[0]
    rows = layout.shape(layer.arguments["experts"])[0]
    tokens = min(step.tokens, rows)
    active = experts * (1 - max(0.0, 1 - rows / tokens / experts) ** tokens)
    reads = _read(layer.inputs, layout)
    for name in ("weight", "bias"):
        table = layer.arguments[name]
        if table is not None:
            reads[table] = round(layout.nbytes(table) * active / experts)
    return Traffic(reads, _written(layer, layout))


def _paged_attention(layer: Layer, layout: Layout, step: Step) -> Traffic:
    """What a sequence sees is read once for all its queries and all heads of a group; what is new is written."""
    pools = [layer.arguments["key_cache"], layer.arguments["value_cache"]]
    reads = _read([tensor for tensor in layer.inputs if tensor not in pools], layout)
    each = sum(layout.shape(pool)[1] * layout.shape(pool)[3] * pool.dtype.itemsize for pool in pools)
    window = layer.arguments["window"]
    keys = sum(count * visible_keys(queries, step.context, window) for count, queries in step.queries())
    return Traffic(reads, _written(layer, layout), each * keys, each * step.tokens)


_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "embedding": _gather("weight"),
        "packed_embedding": _gather("weight"),
        **dict.fromkeys(("index_select", "gather", "index", "take", "take_along_dim"), _gather("self")),
        "copy": _copy,
        **dict.fromkeys(("empty", "new_empty", "empty_like"), _nothing),
        "expert_linear": _expert_linear,
        **dict.fromkeys(("paged_attention", "rotary_paged_attention"), _paged_attention),
    }
)
"""By the name of the operator. All others read their inputs and write their outputs."""
