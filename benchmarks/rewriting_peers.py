"""The same rewriting by what torch ships: `fx.replace_pattern`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewriting_graphs import EPS, HIDDEN, MATCHES_PER_LAYER, transformer

aten, bench = torch.ops.aten, torch.ops.bench


def biased(q, k, v, bq, bk, bv):
    return bench.attention.default(aten.add.Tensor(q, bq), aten.add.Tensor(k, bk), aten.add.Tensor(v, bv))


def fused(q, k, v, bq, bk, bv):
    return bench.attention_with_bias.default(q, k, v, bq, bk, bv)


def gated(gate, up):
    return aten.mul.Tensor(aten.silu.default(gate), up)


def gated_fused(gate, up):
    return bench.silu_mul.default(gate, up)


def add_norm(x, residual, weight):
    total = aten.add.Tensor(x, residual)
    return aten.rms_norm.default(total, [HIDDEN], weight, EPS), total


def add_norm_fused(x, residual, weight):
    both = bench.add_rms_norm.default(x, residual, weight, EPS)
    return both[0], both[1]


PAIRS: tuple[tuple[Callable, Callable], ...] = ((biased, fused), (gated, gated_fused), (add_norm, add_norm_fused))


def _fused_calls(graph: fx.Graph) -> int:
    targets = (bench.attention_with_bias.default, bench.silu_mul.default, bench.add_rms_norm.default)
    return sum(node.target in targets for node in graph.nodes)


def _graph_module(layers: int) -> fx.GraphModule:
    return transformer(layers).to_graph_module()


def replace_pattern(module: fx.GraphModule) -> None:
    expected = MATCHES_PER_LAYER * sum(node.target is bench.attention.default for node in module.graph.nodes)
    for pattern, replacement in PAIRS:
        fx.replace_pattern(module, fx.symbolic_trace(pattern), fx.symbolic_trace(replacement))
    _check(module.graph, expected)


def _check(graph: fx.Graph, expected: int) -> None:
    found = _fused_calls(graph)
    if found != expected:
        raise SystemExit(f"a peer made {found} fused calls where {expected} were expected")


PEERS: dict[str, tuple[Callable[[int], Any], Callable[[Any], None]]] = {
    "fx.replace_pattern": (_graph_module, replace_pattern),
}
