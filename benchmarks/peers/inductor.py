"""Inductor's pattern matcher, in both forms it offers.

`register_replacement` traces a search and a replacement function, and traces both again at each match with the shapes
found there. Inductor's graphs have a fake tensor on every node, here with a symbolic number of tokens. Tracing would
decompose `silu` and `rms_norm`: that is switched off, and the norm is an operator of its own. `register_graph_pattern`
takes a pattern and a handler that edits the graph itself.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx
from torch._inductor import pattern_matcher as pm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from peers import Fused
from peers.fx_graphs import aten, bench, biased, biased_fused, count_fused, gated, gated_fused, graph_module
from rewriting_graphs import EPS, HIDDEN, WIDE, transformer

EXAMPLE_TOKENS = 16


def add_norm(x, residual, weight):
    total = aten.add.Tensor(x, residual)
    return bench.norm.default(total, weight, EPS), total


def add_norm_fused(x, residual, weight):
    both = bench.add_rms_norm.default(x, residual, weight, EPS)
    return both[0], both[1]


class RegisterReplacement:
    name = "Inductor register_replacement"
    package = "torch"
    most_layers = 100

    def __init__(self) -> None:
        self.patterns = pm.PatternMatcherPass()
        row, wide, bias = (EXAMPLE_TOKENS, HIDDEN), (EXAMPLE_TOKENS, WIDE), (HIDDEN,)
        for search, result, shapes in (
            (biased, biased_fused, [row, row, row, bias, bias, bias]),
            (gated, gated_fused, [wide, wide]),
            (add_norm, add_norm_fused, [row, row, bias]),
        ):
            with FakeTensorMode():
                examples = [torch.empty(shape) for shape in shapes]
                pm.register_replacement(search, result, examples, pm.fwd_only, self.patterns, get_decomp_fn=dict)

    def prepare(self, layers: int) -> fx.GraphModule:
        network = transformer(layers)
        module = network.to_graph_module()
        for node in module.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
            node.target, node.args = bench.norm.default, (node.args[0], node.args[2], EPS)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        rows = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        row = mode.from_tensor(torch.empty(EXAMPLE_TOKENS, HIDDEN), symbolic_context=rows)
        with mode:
            values = [row, row, *(torch.empty(tensor.shape) for tensor in network.constants)]
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*values)
        return module

    def run(self, subject: fx.GraphModule) -> None:
        self.patterns.apply(subject)

    def fused(self, subject: fx.GraphModule) -> Fused:
        return count_fused(subject)


class GraphPatterns:
    name = "Inductor graph patterns"
    package = "torch"
    most_layers = 5000

    def __init__(self) -> None:
        self.patterns = pm.PatternMatcherPass()
        arg, call = pm.KeywordArg, pm.CallFunction
        adds = (call(aten.add.Tensor, arg(name), arg(f"b{name}")) for name in "qkv")
        silu = call(aten.silu.default, arg("gate"))
        total = call(aten.add.Tensor, arg("x"), arg("residual"), _users=pm.MULTIPLE)
        self.register(call(bench.attention.default, *adds), _attention)
        self.register(call(aten.mul.Tensor, silu, arg("up")), _silu_mul)
        self.register(call(aten.mul.Tensor, arg("up"), silu), _silu_mul)
        self.register(call(aten.rms_norm.default, total, pm.Ignored(), arg("weight"), pm.Ignored()), _add_norm)

    def register(self, pattern, handler) -> None:
        pm.register_graph_pattern(pattern, pass_dict=self.patterns)(handler)

    def prepare(self, layers: int) -> fx.GraphModule:
        return graph_module(layers)

    def run(self, subject: fx.GraphModule) -> None:
        self.patterns.apply(subject)

    def fused(self, subject: fx.GraphModule) -> Fused:
        return count_fused(subject)


def _attention(match: pm.Match, q, k, v, bq, bk, bv) -> None:
    _replace(match, bench.attention_with_bias.default, (q, k, v, bq, bk, bv))


def _silu_mul(match: pm.Match, gate, up) -> None:
    _replace(match, bench.silu_mul.default, (gate, up))


def _replace(match: pm.Match, target, args: tuple) -> None:
    node = match.output_node()
    with match.graph.inserting_before(node):
        new = match.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    match.erase_nodes()


def _add_norm(match: pm.Match, x, residual, weight) -> None:
    graph, norm = match.graph, match.output_node()
    total = norm.args[0]
    with graph.inserting_before(total):
        both = graph.call_function(bench.add_rms_norm.default, (x, residual, weight, EPS))
        normed, summed = (graph.call_function(getitem, (both, i)) for i in range(2))
    norm.replace_all_uses_with(normed)
    total.replace_all_uses_with(summed)
    match.erase_nodes()


PEERS = (RegisterReplacement, GraphPatterns)
