"""xDSL: its greedy worklist driver with rules in Python, and the same driver with rules in PDL, interpreted."""

from __future__ import annotations

from typing import Any

from xdsl.context import Context
from xdsl.dialects import pdl
from xdsl.dialects.builtin import Builtin, ModuleOp, TensorType, f32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.interpreters.pdl import PDLRewritePattern
from xdsl.ir import Block, Dialect, Operation, Region, SSAValue
from xdsl.irdl import IRDLOperation, irdl_op_definition, operand_def, result_def, traits_def
from xdsl.parser import Parser
from xdsl.pattern_rewriter import GreedyRewritePatternApplier, PatternRewriter, PatternRewriteWalker, RewritePattern
from xdsl.traits import Pure

from peers import Fused
from peers.calls import calls, leaves
from rewriting_graphs import transformer

ROW = TensorType(f32, [-1, 32])


def _op(name: str, operands: int, results: int = 1) -> type[IRDLOperation]:
    fields = {f"operand_{i}": operand_def() for i in range(operands)}
    fields |= {f"result_{i}": result_def() for i in range(results)}
    return irdl_op_definition(
        type(name, (IRDLOperation,), {"name": f"bench.{name}", "traits": traits_def(Pure()), **fields})
    )


linear, add, mul, silu = _op("linear", 2), _op("add", 2), _op("mul", 2), _op("silu", 1)
rms_norm, attention = _op("rms_norm", 2), _op("attention", 3)
attention_with_bias, silu_mul = _op("attention_with_bias", 6), _op("silu_mul", 2)
add_rms_norm = _op("add_rms_norm", 3, 2)
OPS = (linear, add, mul, silu, rms_norm, attention, attention_with_bias, silu_mul, add_rms_norm)
BY_NAME = {op.name.removeprefix("bench."): op for op in OPS}


def _producer(value: SSAValue, kind: type[IRDLOperation]) -> Operation | None:
    """The operation of that kind that makes the value for one reader alone."""
    return value.owner if isinstance(value.owner, kind) and value.has_one_use() else None


class AttentionWithBias(RewritePattern):
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if isinstance(op, attention):
            adds = [_producer(value, add) for value in op.operands]
            if all(adds):
                operands = [each.operands[i] for i in range(2) for each in adds]
                rewriter.replace(op, attention_with_bias.create(operands=operands, result_types=[ROW]))
                for each in adds:
                    rewriter.erase(each)


class SiluMul(RewritePattern):
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if isinstance(op, mul):
            for gate, up in (op.operands, reversed(op.operands)):
                inner = _producer(gate, silu)
                if inner is not None:
                    operands = [inner.operands[0], up]
                    rewriter.replace(op, silu_mul.create(operands=operands, result_types=[ROW]))
                    rewriter.erase(inner)
                    return


class AddNorm(RewritePattern):
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if isinstance(op, rms_norm) and isinstance(total := op.operands[0].owner, add):
            both = add_rms_norm.create(operands=[*total.operands, op.operands[1]], result_types=[ROW, ROW])
            rewriter.insert(both)
            rewriter.replace(op, [], [both.results[0]])
            rewriter.replace(total, [], [both.results[1]])


PDL = """
pdl.pattern @attention : benefit(1) {
  %t = pdl.type
  %q = pdl.operand
  %k = pdl.operand
  %v = pdl.operand
  %bq = pdl.operand
  %bk = pdl.operand
  %bv = pdl.operand
  %aq = pdl.operation "bench.add" (%q, %bq : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  %ak = pdl.operation "bench.add" (%k, %bk : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  %av = pdl.operation "bench.add" (%v, %bv : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  %rq = pdl.result 0 of %aq
  %rk = pdl.result 0 of %ak
  %rv = pdl.result 0 of %av
  %root = pdl.operation "bench.attention" (%rq, %rk, %rv : !pdl.value, !pdl.value, !pdl.value) -> (%t : !pdl.type)
  pdl.rewrite %root {
    %new = pdl.operation "bench.attention_with_bias" (%q, %k, %v, %bq, %bk, %bv : !pdl.value, !pdl.value, !pdl.value, !pdl.value, !pdl.value, !pdl.value) -> (%t : !pdl.type)
    pdl.replace %root with %new
  }
}
pdl.pattern @silu_mul : benefit(1) {
  %t = pdl.type
  %gate = pdl.operand
  %up = pdl.operand
  %silu = pdl.operation "bench.silu" (%gate : !pdl.value) -> (%t : !pdl.type)
  %s = pdl.result 0 of %silu
  %root = pdl.operation "bench.mul" (%s, %up : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  pdl.rewrite %root {
    %new = pdl.operation "bench.silu_mul" (%gate, %up : !pdl.value, !pdl.value) -> (%t : !pdl.type)
    pdl.replace %root with %new
  }
}
pdl.pattern @add_norm : benefit(1) {
  %t = pdl.type
  %x = pdl.operand
  %residual = pdl.operand
  %weight = pdl.operand
  %total = pdl.operation "bench.add" (%x, %residual : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  %sum = pdl.result 0 of %total
  %root = pdl.operation "bench.rms_norm" (%sum, %weight : !pdl.value, !pdl.value) -> (%t : !pdl.type)
  pdl.rewrite %root {
    %new = pdl.operation "bench.add_rms_norm" (%x, %residual, %weight : !pdl.value, !pdl.value, !pdl.value) -> (%t, %t : !pdl.type, !pdl.type)
    %n = pdl.result 0 of %new
    %s = pdl.result 1 of %new
    pdl.replace %root with (%n : !pdl.value)
    pdl.replace %total with (%s : !pdl.value)
  }
}
"""  # noqa: E501


class Greedy:
    name = "xDSL greedy"
    package = "xdsl"
    most_layers = 5000

    def __init__(self) -> None:
        self.rules: list[RewritePattern] = [AttentionWithBias(), SiluMul(), AddNorm()]

    def prepare(self, layers: int) -> ModuleOp:
        network = transformer(layers)
        inputs = leaves(network)
        block = Block(arg_types=[ROW] * len(inputs))
        values: dict[Any, SSAValue] = dict(zip(inputs, block.args, strict=True))
        for kind, operands, output in calls(network):
            op = BY_NAME[kind].create(operands=[values[tensor] for tensor in operands], result_types=[ROW])
            block.add_op(op)
            values[output] = op.results[0]
        outputs = [values[tensor] for tensor in network.outputs]
        block.add_op(ReturnOp(*outputs))
        return ModuleOp([FuncOp("main", ([ROW] * len(inputs), [ROW] * len(outputs)), Region(block))])

    def run(self, subject: ModuleOp) -> None:
        PatternRewriteWalker(GreedyRewritePatternApplier(self.rules)).rewrite_module(subject)

    def fused(self, subject: ModuleOp) -> Fused:
        subject.verify()
        names = [op.name.removeprefix("bench.") for op in subject.walk()]
        return Fused(*(names.count(name) for name in Fused._fields))


class Interpreted(Greedy):
    name = "xDSL PDL"
    most_layers = 5000

    def __init__(self) -> None:
        context = Context()
        for dialect in (Builtin, pdl.PDL, Dialect("bench", list(OPS))):
            context.load_dialect(dialect)
        module = Parser(context, PDL).parse_module()
        self.rules = [PDLRewritePattern(op, context) for op in module.walk() if isinstance(op, pdl.RewriteOp)]


PEERS = (Greedy, Interpreted)
