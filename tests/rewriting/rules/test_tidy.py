"""Rules that leave every value as it is: what each turns into what, in text, and that the numbers stay."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.rules.cancel_transposes import CancelTransposes, PermuteToTranspose, SelectBeforeTranspose
from enginery.rewriting.rules.cancel_unsqueeze import CancelUnsqueeze
from enginery.rewriting.rules.common_subexpressions import CommonSubexpressions, block_of
from enginery.rewriting.rules.dead_code import DeadCode
from enginery.rewriting.rules.drop_casts import DropCasts
from enginery.rewriting.rules.drop_copies import DropCopies
from enginery.rewriting.rules.drop_identities import DropIdentities
from enginery.rewriting.rules.drop_views import DropViews
from enginery.rewriting.rules.expand_baddbmm import ExpandBaddbmm
from enginery.rewriting.rules.linear_from_matmul import BiasIntoLinear, LinearFromMatmul
from enginery.rewriting.rules.merge_reshapes import MergeReshapes
from enginery.rewriting.rules.sink_transposes import SinkTransposes, TransposeOfUnsqueeze
from enginery.rewriting.rules.view_to_reshape import ViewToReshape
from enginery.rewriting.testing import assert_rewrites


class Case(NamedTuple):
    rule: PatternRewriter
    before: str
    after: str


X = "input %x: float32[2, n, 6]\n"
COPIED = f"{X}%r: float32[2, n, 6] = aten.neg(%x)\noutput r = %r"
PLAIN = f"{X}%r: float32[2, n, 6] = aten.neg(%x)\noutput r = %r"


def behind(call: str) -> str:
    """A network that negates what the call makes of x."""
    return f"{X}%a: float32[2, n, 6] = {call}\n%r: float32[2, n, 6] = aten.neg(%a)\noutput r = %r"


VANISHING = [
    (DropCasts(), "aten.to.dtype(%x, float32)"),
    (DropCasts(), "aten.type_as(%x, %x)"),
    (DropCopies(), "aten.contiguous(%x)"),
    (DropCopies(), "aten.clone(%x)"),
    (DropCopies(), "aten.alias(%x)"),
    (DropCopies(), "aten.dropout(%x, 0.5, False)"),
    (DropViews(), "aten.reshape(%x, [2, n, 6])"),
    (DropViews(), "aten.expand(%x, [2, -1, 6])"),
    (DropViews(), "aten.slice.Tensor(%x, dim=1)"),
    (DropViews(), "aten.slice.Tensor(%x, dim=2, start=0, end=6)"),
    (DropViews(), "aten.repeat(%x, [1, 1, 1])"),
    (DropIdentities(), "aten.mul.Tensor(%x, 1.0)"),
    (DropIdentities(), "aten.mul.Tensor(%x, 1)"),
    (DropIdentities(), "aten.div.Tensor(%x, 1)"),
    (DropIdentities(), "aten.sub.Tensor(%x, 0.0)"),
    (DropIdentities(), "aten.pow.Tensor_Scalar(%x, 1)"),
]
STAYING = [
    (DropCasts(), "aten.to.dtype(%x, float64)", "float64[2, n, 6]"),
    (DropViews(), "aten.slice.Tensor(%x, dim=2, start=2)", "float32[2, n, 4]"),
    (DropViews(), "aten.reshape(%x, [2, n, 2, 3])", "float32[2, n, 2, 3]"),
    (DropIdentities(), "aten.mul.Tensor(%x, 2.0)", "float32[2, n, 6]"),
    (DropIdentities(), "aten.add.Tensor(%x, 0.0)", "float32[2, n, 6]"),  # −0.0 + 0.0 is +0.0
    (DropIdentities(), "aten.sub.Tensor(%x, 1)", "float32[2, n, 6]"),
    (CancelTransposes(), "aten.transpose.int(%x, 0, 1)", "float32[n, 2, 6]"),
    (CancelUnsqueeze(), "aten.select.int(%x, 0, 1)", "float32[n, 6]"),
]


@pytest.mark.parametrize(("rule", "call"), VANISHING, ids=str)
def test_calls_that_vanish(rule: PatternRewriter, call: str) -> None:
    assert_rewrites(network(behind(call)), text(PLAIN), rule)


@pytest.mark.parametrize(("rule", "call", "type_text"), STAYING, ids=str)
def test_calls_that_stay(rule: PatternRewriter, call: str, type_text: str) -> None:
    before = network(f"{X}%r: {type_text} = {call}\noutput r = %r")
    assert RewritePatternManager(rule).rewrite(before).rewritten == 0


def text(body: str) -> str:
    return f"network 1\n{body}\n"


def network(body: str) -> Network:
    return Network.parse(text(body))


CASES = {
    "one spelling of casts": Case(
        DropCasts(),
        "input %x: float32[n]\ninput %y: bfloat16[n]\n%r: bfloat16[n] = aten.type_as(%x, %y)\noutput r = %r",
        "input %x: float32[n]\ninput %y: bfloat16[n]\n%r: bfloat16[n] = aten.to.dtype(%x, bfloat16)\noutput r = %r",
    ),
    "view": Case(
        ViewToReshape(),
        f"{X}%r: float32[2, n, 2, 3] = aten.view(%x, [2, n, -1, 3])\noutput r = %r",
        f"{X}%r: float32[2, n, 2, 3] = aten.reshape(%x, [2, n, 2, 3])\noutput r = %r",
    ),
    "flatten": Case(
        ViewToReshape(),
        f"{X}%r: float32[2, 6*n] = aten.flatten.using_ints(%x, start_dim=1, end_dim=2)\noutput r = %r",
        f"{X}%r: float32[2, 6*n] = aten.reshape(%x, [2, 6*n])\noutput r = %r",
    ),
    "two reshapes": Case(
        MergeReshapes(),
        f"{X}%a: float32[2*n, 6] = aten.reshape(%x, [2*n, 6])\n"
        "%r: float32[2*n, 2, 3] = aten.reshape(%a, [2*n, 2, 3])\noutput r = %r",
        f"{X}%r: float32[2*n, 2, 3] = aten.reshape(%x, [2*n, 2, 3])\noutput r = %r",
    ),
    "a reshape behind an unsqueeze": Case(
        MergeReshapes(),
        f"{X}%a: float32[1, 2, n, 6] = aten.unsqueeze(%x, 0)\n"
        "%r: float32[2*n, 6] = aten.reshape(%a, [-1, 6])\noutput r = %r",
        f"{X}%r: float32[2*n, 6] = aten.reshape(%x, [2*n, 6])\noutput r = %r",
    ),
    "transposes": Case(
        CancelTransposes(),
        f"{X}%a: float32[2, 6, n] = aten.transpose.int(%x, 1, 2)\n"
        "%b: float32[2, n, 6] = aten.transpose.int(%a, -1, -2)\n"
        "%r: float32[2, n, 6] = aten.neg(%b)\noutput r = %r",
        PLAIN,
    ),
    "T of T": Case(
        CancelTransposes(),
        "input %x: float32[n, 3]\n%a: float32[3, n] = aten.numpy_T(%x)\n%b: float32[n, 3] = aten.t(%a)\n"
        "%r: float32[n, 3] = aten.neg(%b)\noutput r = %r",
        "input %x: float32[n, 3]\n%r: float32[n, 3] = aten.neg(%x)\noutput r = %r",
    ),
    "a permutation of two": Case(
        PermuteToTranspose(),
        f"{X}%r: float32[6, n, 2] = aten.permute(%x, [2, 1, 0])\noutput r = %r",
        f"{X}%r: float32[6, n, 2] = aten.transpose.int(%x, 0, 2)\noutput r = %r",
    ),
    "a select of another axis": Case(
        SelectBeforeTranspose(),
        f"{X}%a: float32[2, 6, n] = aten.transpose.int(%x, 1, 2)\n"
        "%r: float32[6, n] = aten.select.int(%a, 0, 1)\noutput r = %r",
        f"{X}%a: float32[n, 6] = aten.select.int(%x, 0, 1)\n"
        "%r: float32[6, n] = aten.transpose.int(%a, 0, 1)\noutput r = %r",
    ),
    "a select of a moved axis": Case(
        SelectBeforeTranspose(),
        f"{X}%a: float32[n, 2, 6] = aten.transpose.int(%x, 0, 1)\n"
        "%r: float32[n, 6] = aten.select.int(%a, 1, 1)\noutput r = %r",
        f"{X}%r: float32[n, 6] = aten.select.int(%x, 0, 1)\noutput r = %r",
    ),
    "select of unsqueeze": Case(
        CancelUnsqueeze(),
        f"{X}%a: float32[1, 2, n, 6] = aten.unsqueeze(%x, 0)\n%b: float32[2, n, 6] = aten.select.int(%a, 0, 0)\n"
        "%r: float32[2, n, 6] = aten.neg(%b)\noutput r = %r",
        PLAIN,
    ),
    "one of two equal calls": Case(
        CommonSubexpressions(),
        f"{X}%a: float32[2, n, 6] = aten.silu(%x)\n%b: float32[2, n, 6] = aten.silu(%x)\n"
        "%r: float32[2, n, 6] = aten.mul.Tensor(%a, %b)\noutput r = %r",
        f"{X}%a: float32[2, n, 6] = aten.silu(%x)\n%r: float32[2, n, 6] = aten.mul.Tensor(%a, %a)\noutput r = %r",
    ),
    "dead code": Case(
        DeadCode(),
        f"{X}%a: float32[2, n, 6] = aten.silu(%x)\n%b: float32[2, n, 6] = aten.sin(%a)\n"
        "%r: float32[2, n, 6] = aten.neg(%x)\noutput r = %r",
        PLAIN,
    ),
    "matmul with a constant": Case(
        LinearFromMatmul(),
        f"{X}constant %c: float32[6, 4]\n%r: float32[2, n, 4] = aten.matmul(%x, %c)\noutput r = %r",
        f"{X}constant %c: float32[6, 4]\n%w: float32[4, 6] = aten.transpose.int(%c, 0, 1)\n"
        "%r: float32[2, n, 4] = aten.linear(%x, %w)\noutput r = %r",
    ),
    "addmm": Case(
        LinearFromMatmul(),
        "input %x: float32[n, 6]\nconstant %c: float32[6, 4]\nconstant %b: float32[4]\n"
        "%r: float32[n, 4] = aten.addmm(%b, %x, %c)\noutput r = %r",
        "input %x: float32[n, 6]\nconstant %c: float32[6, 4]\nconstant %b: float32[4]\n"
        "%w: float32[4, 6] = aten.transpose.int(%c, 0, 1)\n"
        "%r: float32[n, 4] = aten.linear(%x, %w, bias=%b)\noutput r = %r",
    ),
    "a bias": Case(
        BiasIntoLinear(),
        f"{X}constant %w: float32[4, 6]\nconstant %b: float32[4]\n%a: float32[2, n, 4] = aten.linear(%x, %w)\n"
        "%r: float32[2, n, 4] = aten.add.Tensor(%b, %a)\noutput r = %r",
        f"{X}constant %w: float32[4, 6]\nconstant %b: float32[4]\n"
        "%r: float32[2, n, 4] = aten.linear(%x, %w, bias=%b)\noutput r = %r",
    ),
    "baddbmm": Case(
        ExpandBaddbmm(),
        "input %b: float32[4, 1, n]\ninput %x: float32[4, m, 3]\ninput %y: float32[4, 3, n]\n"
        "%r: float32[4, m, n] = aten.baddbmm(%b, %x, %y, beta=0.5, alpha=0.25)\noutput r = %r",
        "input %b: float32[4, 1, n]\ninput %x: float32[4, m, 3]\ninput %y: float32[4, 3, n]\n"
        "%p: float32[4, m, n] = aten.bmm(%x, %y)\n%q: float32[4, m, n] = aten.mul.Tensor(%p, 0.25)\n"
        "%c: float32[4, 1, n] = aten.mul.Tensor(%b, 0.5)\n"
        "%r: float32[4, m, n] = aten.add.Tensor(%q, %c)\noutput r = %r",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of(name: str) -> None:
    case = CASES[name]
    assert_rewrites(network(case.before), text(case.after), case.rule)


UNCHANGED = {
    "a dropout that trains": (DropCopies(), f"{X}%r: float32[2, n, 6] = aten.dropout(%x, 0.5, True)\noutput r = %r"),
    "addmm with alpha": (
        LinearFromMatmul(),
        "input %x: float32[n, 6]\nconstant %c: float32[6, 4]\nconstant %b: float32[4]\n"
        "%r: float32[n, 4] = aten.addmm(%b, %x, %c, alpha=0.5)\noutput r = %r",
    ),
    "matmul of two inputs": (
        LinearFromMatmul(),
        f"{X}input %y: float32[6, 3]\n%r: float32[2, n, 3] = aten.matmul(%x, %y)\noutput r = %r",
    ),
    "a bias on a product with another reader": (
        BiasIntoLinear(),
        f"{X}constant %w: float32[4, 6]\nconstant %b: float32[4]\n%a: float32[2, n, 4] = aten.linear(%x, %w)\n"
        "%c: float32[2, n, 4] = aten.add.Tensor(%a, %b)\n%r: float32[2, n, 4] = aten.mul.Tensor(%a, %c)\noutput r = %r",
    ),
    "1 and 1.0": (
        CommonSubexpressions(),
        "input %x: int64[n]\n%a: int64[n] = aten.add.Tensor(%x, 1)\n%b: float32[n] = aten.add.Tensor(%x, 1.0)\n"
        "output a = %a\noutput b = %b",
    ),
    "a transpose of other axes": (
        CancelTransposes(),
        f"{X}%a: float32[2, 6, n] = aten.transpose.int(%x, 1, 2)\n%r: float32[6, 2, n] = aten.transpose.int(%a, 0, 1)\n"
        "output r = %r",
    ),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_stays(name: str) -> None:
    rule, body = UNCHANGED[name]
    assert RewritePatternManager(rule).rewrite(network(body)).rewritten == 0


def test_equal_calls_of_different_decoder_layers_stay_two() -> None:
    before = network(
        f"{X}%model.layers.0.a: float32[2, n, 6] = aten.silu(%x)\n%model.layers.1.a: float32[2, n, 6] = aten.silu(%x)\n"
        "%r: float32[2, n, 6] = aten.mul.Tensor(%model.layers.0.a, %model.layers.1.a)\noutput r = %r"
    )
    for layer in before:
        layer.module_path = layer.name.removesuffix(".a")
    assert RewritePatternManager(CommonSubexpressions()).rewrite(before).rewritten == 0
    assert block_of("model.layers.11.mlp.act") == "model.layers.11"
    assert block_of("model.norm") == ""


Q = "input %q: float32[1, n, 4, 6]\ninput %c: float32[n, 6]\n%t: float32[1, 4, n, 6] = aten.transpose.int(%q, 1, 2)\n"
SINKING = {
    "an operand that broadcasts": (
        "%u: float32[1, n, 6] = aten.unsqueeze(%c, 0)\n%v: float32[1, 1, n, 6] = aten.unsqueeze(%u, 1)\n"
        "%r: float32[1, 4, n, 6] = aten.mul.Tensor(%t, %v)\noutput r = %r",
        "%u: float32[1, n, 6] = aten.unsqueeze(%c, 0)\n%v: float32[1, n, 1, 6] = aten.unsqueeze(%u, 2)\n"
        "%m: float32[1, n, 4, 6] = aten.mul.Tensor(%q, %v)\n"
        "%r: float32[1, 4, n, 6] = aten.transpose.int(%m, 1, 2)\noutput r = %r",
    ),
    "slices and a concatenation": (
        "%a: float32[1, 4, n, 3] = aten.slice.Tensor(%t, dim=3, end=3)\n"
        "%b: float32[1, 4, n, 3] = aten.slice.Tensor(%t, dim=3, start=3)\n"
        "%d: float32[1, 4, n, 3] = aten.neg(%b)\n%r: float32[1, 4, n, 6] = aten.cat([%d, %a], dim=-1)\noutput r = %r",
        "%a: float32[1, n, 4, 3] = aten.slice.Tensor(%q, dim=3, end=3)\n"
        "%b: float32[1, n, 4, 3] = aten.slice.Tensor(%q, dim=3, start=3)\n"
        "%d: float32[1, n, 4, 3] = aten.neg(%b)\n%m: float32[1, n, 4, 6] = aten.cat([%d, %a], dim=3)\n"
        "%r: float32[1, 4, n, 6] = aten.transpose.int(%m, 1, 2)\noutput r = %r",
    ),
    "a slice of an exchanged axis": (
        "%r: float32[1, 2, n, 6] = aten.slice.Tensor(%t, dim=1, start=2)\noutput r = %r",
        "%m: float32[1, n, 2, 6] = aten.slice.Tensor(%q, dim=2, start=2)\n"
        "%r: float32[1, 2, n, 6] = aten.transpose.int(%m, 1, 2)\noutput r = %r",
    ),
    "halves": (
        "%s: (float32[1, 4, n, 3], float32[1, 4, n, 3]) = aten.chunk(%t, 2, dim=-1)\n"
        "%r: float32[1, 4, n, 3] = aten.mul.Tensor(%s#0, %s#1)\noutput r = %r",
        "%s: (float32[1, n, 4, 3], float32[1, n, 4, 3]) = aten.chunk(%q, 2, dim=3)\n"
        "%m: float32[1, n, 4, 3] = aten.mul.Tensor(%s#0, %s#1)\n"
        "%r: float32[1, 4, n, 3] = aten.transpose.int(%m, 1, 2)\noutput r = %r",
    ),
    "interleaved pairs": (
        "%a: float32[1, 4, n, 3] = aten.slice.Tensor(%t, dim=3, step=2)\n"
        "%b: float32[1, 4, n, 3] = aten.slice.Tensor(%t, dim=3, start=1, step=2)\n"
        "%d: float32[1, 4, n, 3, 2] = aten.stack([%b, %a], dim=-1)\n"
        "%r: float32[1, 4, n, 6] = aten.reshape(%d, [1, 4, n, 6])\noutput r = %r",
        "%a: float32[1, n, 4, 3] = aten.slice.Tensor(%q, dim=3, step=2)\n"
        "%b: float32[1, n, 4, 3] = aten.slice.Tensor(%q, dim=3, start=1, step=2)\n"
        "%d: float32[1, n, 4, 3, 2] = aten.stack([%b, %a], dim=4)\n"
        "%m: float32[1, n, 4, 6] = aten.reshape(%d, [1, n, 4, 6])\n"
        "%r: float32[1, 4, n, 6] = aten.transpose.int(%m, 1, 2)\noutput r = %r",
    ),
}


@pytest.mark.parametrize("name", SINKING)
def test_transposes_sink(name: str) -> None:
    before, after = SINKING[name]
    inputs = Q.partition("%t")[0]
    assert_rewrites(network(f"{Q}{before}"), text(f"{inputs}{after}"), [SinkTransposes(), TransposeOfUnsqueeze()])


STANDING = {
    "two that exchange other axes": "input %p: float32[1, 6, n, 4]\n"
    "%s: float32[1, 4, n, 6] = aten.transpose.int(%p, 1, 3)\n"
    "%r: float32[1, 4, n, 6] = aten.mul.Tensor(%t, %s)\noutput r = %r",
    "a product": "input %w: float32[5, 6]\n%r: float32[1, 4, n, 5] = aten.linear(%t, %w)\noutput r = %r",
    "a reshape of exchanged axes": "%r: float32[4*n, 6] = aten.reshape(%t, [4*n, 6])\noutput r = %r",
    "an operand that lies across": "input %b: float32[n, 6]\n"
    "%r: float32[1, 4, n, 6] = aten.add.Tensor(%t, %b)\noutput r = %r",
    "a stack before the axes": "%r: float32[2, 1, 4, n, 6] = aten.stack([%t, %t], dim=0)\noutput r = %r",
}


@pytest.mark.parametrize("name", STANDING)
def test_transposes_that_stand(name: str) -> None:
    lines = f"{Q}{STANDING[name]}".splitlines()
    body = "\n".join([line for line in lines if line.startswith("input")] + [line for line in lines if line[0] in "%o"])
    assert RewritePatternManager(SinkTransposes()).rewrite(network(body)).rewritten == 0
