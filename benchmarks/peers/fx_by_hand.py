"""The three rules written by hand for torch.fx: nodes found by their operator, no matcher, no types, no report.

The floor of what a system on torch.fx can cost, not a system: each further rule is such a function.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from peers import Fused
from peers.fx_graphs import aten, bench, count_fused, graph_module
from rewriting_graphs import EPS


def _producer(node: fx.Node, target: torch._ops.OpOverload) -> fx.Node | None:
    """The node if it calls `target` for one reader alone."""
    fits = isinstance(node, fx.Node) and node.target is target and len(node.users) == 1
    return node if fits else None


def _calls(graph: fx.Graph, target: torch._ops.OpOverload) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target, sort=False)


class ByHand:
    name = "torch.fx by hand"
    package = "torch"
    most_layers = 5000

    def prepare(self, layers: int) -> fx.GraphModule:
        return graph_module(layers)

    def run(self, subject: fx.GraphModule) -> None:
        graph = subject.graph
        for node in _calls(graph, bench.attention.default):
            adds = [_producer(value, aten.add.Tensor) for value in node.args]
            if all(adds):
                args = (*(add.args[0] for add in adds), *(add.args[1] for add in adds))
                _replace(graph, node, bench.attention_with_bias.default, args, adds)
        for node in _calls(graph, aten.mul.Tensor):
            one, other = node.args
            silu, up = _producer(one, aten.silu.default), other
            if silu is None:
                silu, up = _producer(other, aten.silu.default), one
            if silu is not None:
                _replace(graph, node, bench.silu_mul.default, (silu.args[0], up), [silu])
        for node in _calls(graph, aten.rms_norm.default):
            total = node.args[0]
            if total.target is aten.add.Tensor:
                _add_norm(graph, node, total)

    def fused(self, subject: fx.GraphModule) -> Fused:
        return count_fused(subject)


def _replace(graph: fx.Graph, node: fx.Node, target, args: tuple, inner: list[fx.Node]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for dead in inner:
        graph.erase_node(dead)


def _add_norm(graph: fx.Graph, norm: fx.Node, total: fx.Node) -> None:
    with graph.inserting_before(total):
        both = graph.call_function(bench.add_rms_norm.default, (*total.args, norm.args[2], EPS))
        normed, summed = (graph.call_function(getitem, (both, i)) for i in range(2))
    norm.replace_all_uses_with(normed)
    graph.erase_node(norm)
    total.replace_all_uses_with(summed)
    graph.erase_node(total)


PEERS = (ByHand,)
