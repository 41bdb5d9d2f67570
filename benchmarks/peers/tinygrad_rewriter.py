"""tinygrad's PatternMatcher and graph_rewrite, on a smaller job: a node has one output there.

The sum that the norm reads stays an addition of its own beside the fused call. Operators that tinygrad has not are
CUSTOM nodes, told apart by their argument.
"""

from __future__ import annotations

from typing import Any

from tinygrad.dtype import dtypes
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat, graph_rewrite

from peers import Fused
from peers.calls import calls, leaves
from rewriting_graphs import transformer

MATH = {"add": Ops.ADD, "mul": Ops.MUL}


def call(name: str, *sources: UOp) -> UOp:
    return UOp(MATH.get(name, Ops.CUSTOM), dtypes.float, sources, None if name in MATH else name)


def pattern(name: str, *sources: UPat) -> UPat:
    """Operands of additions and products in either order."""
    return UPat(Ops.CUSTOM, src=sources, arg=name)


def var(name: str) -> UPat:
    return UPat.var(name)


def biased(name: str) -> UPat:
    return UPat(Ops.ADD, src=(var(name), var(f"b{name}")))


RULES = PatternMatcher(
    [
        (
            pattern("attention", biased("q"), biased("k"), biased("v")),
            lambda q, k, v, bq, bk, bv: call("attention_with_bias", q, k, v, bq, bk, bv),
        ),
        (
            UPat(Ops.MUL, src=[pattern("silu", var("gate")), var("up")]),
            lambda gate, up: call("silu_mul", gate, up),
        ),
        (
            pattern("rms_norm", UPat(Ops.ADD, src=(var("x"), var("residual"))), var("weight")),
            lambda x, residual, weight: call("add_rms_norm", x, residual, weight),
        ),
    ]
)


class Subject:
    def __init__(self, sink: UOp) -> None:
        self.sink = sink


class GraphRewrite:
    name = "tinygrad graph_rewrite (smaller job)"
    package = "tinygrad"
    most_layers = 5000

    def prepare(self, layers: int) -> Subject:
        network = transformer(layers)
        values: dict[Any, UOp] = {leaf: UOp(Ops.CUSTOM, dtypes.float, (), leaf.name) for leaf in leaves(network)}
        for kind, inputs, output in calls(network):
            values[output] = call(kind, *(values[tensor] for tensor in inputs))
        return Subject(UOp.sink(*(values[tensor] for tensor in network.outputs)))

    def run(self, subject: Subject) -> None:
        subject.sink = graph_rewrite(subject.sink, RULES)

    def fused(self, subject: Subject) -> Fused:
        names = [node.arg for node in subject.sink.toposort() if node.op is Ops.CUSTOM]
        return Fused(*(names.count(name) for name in Fused._fields))


PEERS = (GraphRewrite,)
