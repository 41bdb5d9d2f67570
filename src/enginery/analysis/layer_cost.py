"""The cost of each layer of a network in one step, as facts of an analyzer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from enginery.analysis.cost import Cost
from enginery.analysis.flops import flops, is_product
from enginery.analysis.layout import Layout
from enginery.analysis.step import Step
from enginery.analysis.traffic import Traffic, traffic
from enginery.network.dim import Dim
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.rewriting.analysis import AnalysisPatternManager, PatternAnalyzer


@dataclass(frozen=True)
class LayerCost:
    layer: Layer
    cost: Cost
    traffic: Traffic
    dtype: torch.dtype
    """in which it computes: that of a product's operands; float32, the vector units' speed, for all else"""
    has_rule: bool
    """False: its FLOPs are not known, only its bytes"""
    is_folded: bool
    """It is computed once, when weights are bound, not in every step."""


class CostAnalyzer(PatternAnalyzer):
    """LayerCost of every layer of `network` but views, which cost nothing.

    `weights`: inputs of the network that hold weights, as those of an engine's regions do; constants always are.
    Raises UsageError where a symbolic size of the network has no value in the step.
    """

    def __init__(self, network: Network, step: Step, weights: Iterable[Tensor] = ()) -> None:
        self.network = network
        self.step = step
        self.layout = Layout(step.symbols)
        for tensor in network.inputs:
            self.layout.shape(tensor)
        self.known = known_values(network, weights)

    def analyze(self, root: Layer) -> LayerCost | None:
        if self.layout.is_view(root):
            return None
        moved = traffic(root, self.layout, self.step)
        counted = flops(root, self.layout, self.step)
        dtype = _operands(root).dtype if is_product(root.op) else torch.float32
        is_folded = self.known.issuperset(root.outputs)
        return LayerCost(
            root, moved.cost(counted or 0, self.layout, self.known), moved, dtype, counted is not None, is_folded
        )

    def run(self) -> list[LayerCost]:
        """In execution order."""
        return AnalysisPatternManager(self).analyze(self.network)[type(self).__name__]


def _operands(product: Layer) -> Tensor:
    """The one whose dtype gives the speed: a weight with a scale has its input rounded likewise."""
    arguments = product.arguments
    return arguments["weight"] if isinstance(arguments.get("scale"), Tensor) else product.inputs[0]


def known_values(network: Network, weights: Iterable[Tensor] = ()) -> set[Tensor]:
    """Constants, and what follows from them without a symbolic size: computed once, before any step."""
    known = {*network.constants, *weights}
    for layer in network:
        if layer.is_constant and known.issuperset(layer.inputs) and not _has_symbol(layer.args):
            known.update(layer.outputs)
    return known


def _has_symbol(value: Any) -> bool:
    return isinstance(value, Dim) or (isinstance(value, tuple) and any(map(_has_symbol, value)))
