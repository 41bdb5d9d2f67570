"""The network as a torch.fx graph: what the peers that are built on torch.fx have in common."""

from __future__ import annotations

import torch
from torch import fx

from peers import Fused
from rewriting_graphs import EPS, HIDDEN, transformer

aten, bench = torch.ops.aten, torch.ops.bench

FUSED = (bench.attention_with_bias.default, bench.silu_mul.default, bench.add_rms_norm.default)


def graph_module(layers: int) -> fx.GraphModule:
    return transformer(layers).to_graph_module()


def count_fused(module: fx.GraphModule) -> Fused:
    module.graph.lint()
    return Fused(*(len(module.graph.find_nodes(op="call_function", target=target)) for target in FUSED))


def biased(q, k, v, bq, bk, bv):
    return bench.attention.default(aten.add.Tensor(q, bq), aten.add.Tensor(k, bk), aten.add.Tensor(v, bv))


def biased_fused(q, k, v, bq, bk, bv):
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
