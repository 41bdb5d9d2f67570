"""torch.fx.subgraph_rewriter.replace_pattern, one call per rule as it asks for."""

from __future__ import annotations

from torch import fx

from peers import Fused
from peers.fx_graphs import (
    add_norm,
    add_norm_fused,
    biased,
    biased_fused,
    count_fused,
    gated,
    gated_fused,
    graph_module,
)

PAIRS = ((biased, biased_fused), (gated, gated_fused), (add_norm, add_norm_fused))


class ReplacePattern:
    name = "fx.replace_pattern"
    package = "torch"
    most_layers = 1000

    def __init__(self) -> None:
        self.pairs = [(fx.symbolic_trace(pattern), fx.symbolic_trace(result)) for pattern, result in PAIRS]

    def prepare(self, layers: int) -> fx.GraphModule:
        return graph_module(layers)

    def run(self, subject: fx.GraphModule) -> None:
        for pattern, result in self.pairs:
            fx.replace_pattern(subject, pattern, result)

    def fused(self, subject: fx.GraphModule) -> Fused:
        return count_fused(subject)


PEERS = (ReplacePattern,)
