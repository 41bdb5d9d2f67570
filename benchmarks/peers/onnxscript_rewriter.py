"""onnxscript's pattern rewriter, over a graph of onnx-ir."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from peers import Fused
from peers.calls import calls, leaves
from rewriting_graphs import EPS, transformer


def biased(op, q, k, v, bq, bk, bv):
    return op.attention(op.add(q, bq), op.add(k, bk), op.add(v, bv))


def biased_fused(op, q, k, v, bq, bk, bv):
    return op.attention_with_bias(q, k, v, bq, bk, bv)


def gated(op, gate, up):
    return op.mul(op.silu(gate), up)


def gated_fused(op, gate, up):
    return op.silu_mul(gate, up)


def add_norm(op, x, residual, weight):
    total = op.add(x, residual)
    return op.rms_norm(total, weight), total


def add_norm_fused(op, x, residual, weight):
    return op.add_rms_norm(x, residual, weight, eps=EPS, _outputs=2)


PAIRS = ((biased, biased_fused), (gated, gated_fused), (add_norm, add_norm_fused))


class OnnxScript:
    name = "onnxscript"
    package = "onnxscript"
    most_layers = 5000

    def __init__(self) -> None:
        self.rules = RewriteRuleSet([RewriteRule(search, result) for search, result in PAIRS])

    def prepare(self, layers: int) -> ir.Model:
        network = transformer(layers)
        values: dict[Any, ir.Value] = {leaf: ir.Value(name=leaf.name) for leaf in leaves(network)}
        nodes = []
        for kind, inputs, output in calls(network):
            node = ir.Node("", kind, [values[tensor] for tensor in inputs])
            nodes.append(node)
            values[output] = node.outputs[0]
        graph = ir.Graph(
            [values[leaf] for leaf in leaves(network)],
            [values[tensor] for tensor in network.outputs],
            nodes=nodes,
            opset_imports={"": 23},
        )
        return ir.Model(graph, ir_version=10)

    def run(self, subject: ir.Model) -> None:
        self.rules.apply_to_model(subject)

    def fused(self, subject: ir.Model) -> Fused:
        seen: set[ir.Value] = set(subject.graph.inputs)
        names = []
        for node in subject.graph:
            if not seen.issuperset(value for value in node.inputs if value is not None):
                raise ValueError(f"{node.name} runs before its operands")
            seen.update(node.outputs)
            names.append(node.op_type)
        return Fused(*(names.count(name) for name in Fused._fields))


PEERS = (OnnxScript,)
