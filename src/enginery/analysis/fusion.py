"""Chains of memory-bound layers that one kernel could compute: what Inductor fuses at best, or a rule could.

A chain is connected, and none of its values goes through a layer that cannot be fused and comes back: each layer has a
level, the number of such barriers on the longest way to it, and a chain stays on one level. Its values between its own
layers move nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from enginery.analysis.cost import Cost
from enginery.analysis.layer_cost import LayerCost
from enginery.analysis.layout import Layout
from enginery.analysis.traffic import Traffic
from enginery.network.kind import LayerKind
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.operator import signature
from enginery.network.tensor import Tensor

FUSIBLE = frozenset(
    {
        LayerKind.ACTIVATION, LayerKind.CAST, LayerKind.CONCATENATION, LayerKind.ELEMENTWISE, LayerKind.FILL,
        LayerKind.GATHER, LayerKind.IDENTITY, LayerKind.NORMALIZATION, LayerKind.PADDING, LayerKind.REDUCE,
        LayerKind.SELECT, LayerKind.SHUFFLE, LayerKind.SLICE, LayerKind.SOFTMAX, LayerKind.UNARY,
    }
)  # fmt: skip
WHOLE_COPIES = frozenset({"copy", "slice_scatter", "select_scatter"})
"""Scatters whose places are known before the step."""


@dataclass(frozen=True)
class Chain:
    """Layers of one kernel, in execution order; a barrier is a chain of its own."""

    layers: tuple[LayerCost, ...]
    cost: Cost
    """as one kernel"""

    @property
    def apart(self) -> Cost:
        """One layer after the other."""
        return sum((each.cost for each in self.layers), Cost())

    @property
    def flops(self) -> Mapping[torch.dtype, int]:
        counts: Counter[torch.dtype] = Counter()
        for each in self.layers:
            counts[each.dtype] += each.cost.flops
        return counts

    @property
    def path(self) -> str:
        """The module that most of its layers are of."""
        ((path, _),) = Counter(each.layer.module_path for each in self.layers).most_common(1)
        return path


def is_fusible(layer: Layer) -> bool:
    is_pointwise = layer.kind in FUSIBLE or signature(layer.op).short_name in WHOLE_COPIES
    return is_pointwise and layer.op.namespace == "aten" and not layer.has_effects


def fuse(network: Network, costs: Sequence[LayerCost], layout: Layout, known: Collection[Tensor]) -> list[Chain]:
    """The layers that run in every step, as chains in the order of their first layers."""
    live = [each for each in costs if not each.is_folded]
    readers: dict[Tensor, set[Layer]] = {}
    for each in live:
        for tensor in each.layer.inputs:
            readers.setdefault(layout.base(tensor), set()).add(each.layer)
    returned = {layout.base(tensor) for tensor in network.outputs}
    chains = []
    for members in _connected(live, layout):
        flops = sum(each.cost.flops for each in members)
        cost = _fused(members, readers, returned, layout).cost(flops, layout, known)
        chains.append(Chain(tuple(members), cost))
    return chains


def _connected(costs: Sequence[LayerCost], layout: Layout) -> Iterable[list[LayerCost]]:
    """Fusible layers of one level that read one another, by union and find."""
    levels: dict[Layer, int] = {}
    leaders: dict[Layer, Layer] = {}

    def leader(layer: Layer) -> Layer:
        while leaders[layer] is not layer:
            leaders[layer] = layer = leaders[leaders[layer]]
        return layer

    for layer in (each.layer for each in costs):
        parents = (layout.base(tensor).parent for tensor in layer.inputs)
        sources = [parent for parent in parents if parent is not None and parent in levels]
        levels[layer] = max((levels[source] + (not is_fusible(source)) for source in sources), default=0)
        leaders[layer] = layer
        for source in sources if is_fusible(layer) else ():
            if is_fusible(source) and levels[source] == levels[layer]:
                leaders[leader(layer)] = leader(source)
    found: dict[Layer, list[LayerCost]] = {}
    for each in costs:
        found.setdefault(leader(each.layer), []).append(each)
    return found.values()


def _fused(
    members: Sequence[LayerCost], readers: Mapping[Tensor, set[Layer]], returned: Collection[Tensor], layout: Layout
) -> Traffic:
    """What comes from outside is read once, what is used outside is written."""
    inside = {each.layer for each in members}
    reads: dict[Tensor, int] = {}
    writes: dict[Tensor, int] = {}
    for each in members:
        for tensor, count in each.traffic.reads.items():
            if layout.base(tensor).parent not in inside:
                reads[tensor] = max(count, reads.get(tensor, 0))
        for tensor, count in each.traffic.writes.items():
            if tensor in returned or readers.get(tensor, set()) - inside:
                writes[tensor] = count
    moved = [each.traffic for each in members]
    return Traffic(reads, writes, sum(each.kv_reads for each in moved), sum(each.kv_writes for each in moved))
