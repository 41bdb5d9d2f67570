"""Constant factors and offsets go into the weights beside them: golden text before and after, and numbers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.rules.fuse_attention_bias import FuseAttentionWithBias
from enginery.rewriting.rules.merge_factors import MergeFactors
from enginery.rewriting.rules.norm_into_linear import NormIntoLinear
from enginery.rewriting.rules.scalars_to_numbers import ScalarsToNumbers
from enginery.rewriting.rules.scale_before_linear import ScaleBeforeLinear
from enginery.rewriting.rules.scale_into_attention import ScaleIntoAttention
from enginery.rewriting.rules.scale_into_embedding import ScaleIntoEmbedding
from enginery.rewriting.rules.scale_into_linear import ScaleIntoLinear
from enginery.rewriting.testing import assert_rewrites

X = "input %x: float32[n, 6]\n"
W = f"{X}constant %w: float32[4, 6]\nconstant %b: float32[4]\n"
V = "constant %v: float32[5, 6]\n"
C = "constant %c: float32[6]\n"
LINEAR = "%a: float32[n, 4] = aten.linear(%x, %w, bias=%b)\n"


class Case(NamedTuple):
    rule: PatternRewriter
    before: str
    after: str


CASES = {
    "a number behind a linear": Case(
        ScaleIntoLinear(),
        f"{W}{LINEAR}%r: float32[n, 4] = aten.mul.Tensor(%a, 0.3)\noutput r = %r",
        f"{W}%u: float32[4, 6] = aten.mul.Tensor(%w, 0.3)\n%d: float32[4] = aten.mul.Tensor(%b, 0.3)\n"
        "%r: float32[n, 4] = aten.linear(%x, %u, bias=%d)\noutput r = %r",
    ),
    "a divisor behind a linear": Case(
        ScaleIntoLinear(),
        f"{W}%a: float32[n, 4] = aten.linear(%x, %w)\n%r: float32[n, 4] = aten.div.Tensor(%a, 3.0)\noutput r = %r",
        f"{W}%u: float32[4, 6] = aten.div.Tensor(%w, 3.0)\n%r: float32[n, 4] = aten.linear(%x, %u)\noutput r = %r",
    ),
    "one number per output": Case(
        ScaleIntoLinear(),
        f"{W}constant %s: float32[4]\n{LINEAR}%r: float32[n, 4] = aten.mul.Tensor(%s, %a)\noutput r = %r",
        f"{W}constant %s: float32[4]\n%t: float32[4, 1] = aten.unsqueeze(%s, 1)\n"
        "%u: float32[4, 6] = aten.mul.Tensor(%w, %t)\n%d: float32[4] = aten.mul.Tensor(%b, %s)\n"
        "%r: float32[n, 4] = aten.linear(%x, %u, bias=%d)\noutput r = %r",
    ),
    "a wider number": Case(
        ScaleIntoLinear(),
        "input %x: bfloat16[n, 6]\nconstant %w: bfloat16[4, 6]\nconstant %s: float32[]\n"
        "%a: bfloat16[n, 4] = aten.linear(%x, %w)\n%r: bfloat16[n, 4] = aten.mul.Tensor(%a, %s)\noutput r = %r",
        "input %x: bfloat16[n, 6]\nconstant %w: bfloat16[4, 6]\nconstant %s: float32[]\n"
        "%u: bfloat16[4, 6] = aten.mul.Tensor(%w, %s)\n%r: bfloat16[n, 4] = aten.linear(%x, %u)\noutput r = %r",
    ),
    "the weight of a norm, two readers": Case(
        ScaleBeforeLinear(),
        f"{W}{V}{C}%h: float32[n, 6] = aten.mul.Tensor(%c, %x)\n%p: float32[n, 4] = aten.linear(%h, %w, bias=%b)\n"
        "%q: float32[n, 5] = aten.linear(%h, %v)\noutput p = %p\noutput q = %q",
        f"{W}{V}{C}%u: float32[4, 6] = aten.mul.Tensor(%w, %c)\n%p: float32[n, 4] = aten.linear(%x, %u, bias=%b)\n"
        "%t: float32[5, 6] = aten.mul.Tensor(%v, %c)\n%q: float32[n, 5] = aten.linear(%x, %t)\n"
        "output p = %p\noutput q = %q",
    ),
    "a norm that multiplies in float32": Case(
        ScaleBeforeLinear(),
        "input %x: float32[n, 6]\nconstant %w: bfloat16[4, 6]\nconstant %c: float32[6]\n"
        "%h: float32[n, 6] = aten.mul.Tensor(%x, %c)\n%k: bfloat16[n, 6] = aten.to.dtype(%h, bfloat16)\n"
        "%r: bfloat16[n, 4] = aten.linear(%k, %w)\noutput r = %r",
        "input %x: float32[n, 6]\nconstant %w: bfloat16[4, 6]\nconstant %c: float32[6]\n"
        "%k: bfloat16[n, 6] = aten.to.dtype(%x, bfloat16)\n%m: float32[4, 6] = aten.mul.Tensor(%w, %c)\n"
        "%u: bfloat16[4, 6] = aten.to.dtype(%m, bfloat16)\n%r: bfloat16[n, 4] = aten.linear(%k, %u)\noutput r = %r",
    ),
    "a number before a linear": Case(
        ScaleBeforeLinear(),
        f"{W}%h: float32[n, 6] = aten.div.Tensor(%x, 8.0)\n%r: float32[n, 4] = aten.linear(%h, %w, bias=%b)\n"
        "output r = %r",
        f"{W}%u: float32[4, 6] = aten.div.Tensor(%w, 8.0)\n%r: float32[n, 4] = aten.linear(%x, %u, bias=%b)\n"
        "output r = %r",
    ),
    "a layer norm": Case(
        NormIntoLinear(),
        f"{W}{C}constant %o: float32[6]\n%h: float32[n, 6] = aten.layer_norm(%x, [6], weight=%c, bias=%o)\n"
        "%r: float32[n, 4] = aten.linear(%h, %w, bias=%b)\noutput r = %r",
        f"{W}{C}constant %o: float32[6]\n%h: float32[n, 6] = aten.layer_norm(%x, [6])\n"
        "%m: float32[4] = aten.linear(%o, %w)\n%d: float32[4] = aten.add.Tensor(%b, %m)\n"
        "%u: float32[4, 6] = aten.mul.Tensor(%w, %c)\n%r: float32[n, 4] = aten.linear(%h, %u, bias=%d)\noutput r = %r",
    ),
    "an RMS norm in one call": Case(
        NormIntoLinear(),
        f"{W}{C}%h: float32[n, 6] = aten.rms_norm(%x, [6], weight=%c, eps=1e-05)\n"
        "%r: float32[n, 4] = aten.linear(%h, %w)\noutput r = %r",
        f"{W}{C}%h: float32[n, 6] = aten.rms_norm(%x, [6], eps=1e-05)\n%u: float32[4, 6] = aten.mul.Tensor(%w, %c)\n"
        "%r: float32[n, 4] = aten.linear(%h, %u)\noutput r = %r",
    ),
    "an embedding": Case(
        ScaleIntoEmbedding(),
        "input %i: int64[n]\nconstant %w: float32[4, 6]\n%a: float32[n, 6] = aten.embedding(%w, %i)\n"
        "%r: float32[n, 6] = aten.mul.Tensor(%a, 12.0)\noutput r = %r",
        "input %i: int64[n]\nconstant %w: float32[4, 6]\n%u: float32[4, 6] = aten.mul.Tensor(%w, 12.0)\n"
        "%r: float32[n, 6] = aten.embedding(%u, %i)\noutput r = %r",
    ),
    "a factor behind a norm": Case(
        MergeFactors(),
        f"{X}{C}%h: float32[n, 6] = aten.mul.Tensor(%c, %x)\n%r: float32[n, 6] = aten.div.Tensor(%h, 2.5)\n"
        "output r = %r",
        f"{X}{C}%d: float32[6] = aten.div.Tensor(%c, 2.5)\n%r: float32[n, 6] = aten.mul.Tensor(%x, %d)\noutput r = %r",
    ),
    "a factor behind a layer norm": Case(
        MergeFactors(),
        f"{X}{C}constant %o: float32[6]\n%h: float32[n, 6] = aten.layer_norm(%x, [6], weight=%c, bias=%o)\n"
        "%r: float32[n, 6] = aten.mul.Tensor(%h, 2.5)\noutput r = %r",
        f"{X}{C}constant %o: float32[6]\n%d: float32[6] = aten.mul.Tensor(%c, 2.5)\n"
        "%e: float32[6] = aten.mul.Tensor(%o, 2.5)\n"
        "%r: float32[n, 6] = aten.layer_norm(%x, [6], weight=%d, bias=%e)\noutput r = %r",
    ),
    "an attention's query, behind views": Case(
        ScaleIntoAttention(),
        "input %q: float32[n, 8]\ninput %k: float32[n, 1, 4]\n%s: float32[n, 8] = aten.mul.Tensor(%q, 0.5)\n"
        "%h: float32[n, 2, 4] = aten.reshape(%s, [n, 2, 4])\n"
        "%r: float32[n, 2, 4] = enginery.attention(%h, %k, %k, 0.25)\noutput r = %r",
        "input %q: float32[n, 8]\ninput %k: float32[n, 1, 4]\n%h: float32[n, 2, 4] = aten.reshape(%q, [n, 2, 4])\n"
        "%r: float32[n, 2, 4] = enginery.attention(%h, %k, %k, 0.125)\noutput r = %r",
    ),
    "an attention's key": Case(
        ScaleIntoAttention(),
        "input %q: float32[n, 2, 4]\ninput %k: float32[n, 1, 4]\n%s: float32[n, 1, 4] = aten.div.Tensor(%k, 4.0)\n"
        "%r: float32[n, 2, 4] = enginery.attention(%q, %s, %k, 1.0, window=3)\noutput r = %r",
        "input %q: float32[n, 2, 4]\ninput %k: float32[n, 1, 4]\n"
        "%r: float32[n, 2, 4] = enginery.attention(%q, %k, %k, 0.25, window=3)\noutput r = %r",
    ),
    "a bias of TensorRT-LLM's attention": Case(
        FuseAttentionWithBias(),
        "input %x: float32[n, 16]\nconstant %b: float32[16]\n%s: float32[n, 16] = aten.add.Tensor(%b, %x)\n"
        "%r: float32[n, 8] = enginery.gpt_attention(%s, 2, 1, 4, q_scaling=2.0)\noutput r = %r",
        "input %x: float32[n, 16]\nconstant %b: float32[16]\n"
        "%r: float32[n, 8] = enginery.gpt_attention(%x, 2, 1, 4, q_scaling=2.0, qkv_bias=%b)\noutput r = %r",
    ),
}  # fmt: skip


def network(body: str) -> Network:
    return Network.parse(f"network 1\n{body}\n")


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of(name: str) -> None:
    rule, before, after = CASES[name]
    assert_rewrites(network(before), f"network 1\n{after}\n", rule)


UNCHANGED = {
    "a tied weight": (
        ScaleIntoLinear(),
        f"{W}{LINEAR}%r: float32[n, 4] = aten.mul.Tensor(%a, 2.0)\n%s: float32[n, 4] = aten.linear(%x, %w)\n"
        "output r = %r\noutput s = %s",
        "w is read by others",
    ),
    "a product that is read unscaled": (
        ScaleIntoLinear(),
        f"{W}{LINEAR}%r: float32[n, 4] = aten.mul.Tensor(%a, 2.0)\n%s: float32[n, 4] = aten.add.Tensor(%a, %r)\n"
        "output s = %s",
        "read unscaled",
    ),
    "a factor per token": (
        ScaleIntoLinear(),
        f"{W}input %t: float32[n, 1]\n{LINEAR}%r: float32[n, 4] = aten.mul.Tensor(%a, %t)\noutput r = %r",
        "",
    ),
    "a weight that is an input": (
        ScaleIntoLinear(),
        f"{X}input %w: float32[4, 6]\n%a: float32[n, 4] = aten.linear(%x, %w)\n"
        "%r: float32[n, 4] = aten.mul.Tensor(%a, 2.0)\noutput r = %r",
        "no weight",
    ),
    "a factor that widens": (
        ScaleIntoLinear(),
        "input %x: bfloat16[n, 6]\nconstant %w: bfloat16[4, 6]\nconstant %s: float32[4]\n"
        "%a: bfloat16[n, 4] = aten.linear(%x, %w)\n%r: float32[n, 4] = aten.mul.Tensor(%a, %s)\noutput r = %r",
        "",
    ),
    "a norm that the residual stream reads": (
        ScaleBeforeLinear(),
        f"{W}{C}%h: float32[n, 6] = aten.mul.Tensor(%c, %x)\n%p: float32[n, 4] = aten.linear(%h, %w)\n"
        "%q: float32[n, 6] = aten.neg(%h)\noutput p = %p\noutput q = %q",
        "",
    ),
    "a number over a linear": (
        ScaleBeforeLinear(),
        f"{W}constant %m: float32[6, 6]\n%h: float32[n, 6] = aten.linear(%x, %m)\n"
        "%i: float32[n, 6] = aten.reciprocal(%h)\n%r: float32[n, 4] = aten.linear(%i, %w)\noutput r = %r",
        "",
    ),
    "a head that shares the embedding": (
        ScaleIntoEmbedding(),
        "input %i: int64[n]\nconstant %w: float32[4, 6]\n%a: float32[n, 6] = aten.embedding(%w, %i)\n"
        "%s: float32[n, 6] = aten.mul.Tensor(%a, 12.0)\n%r: float32[n, 4] = aten.linear(%s, %w)\noutput r = %r",
        "w is read by others",
    ),
    "a factor that is a tensor": (
        ScaleIntoAttention(),
        "input %q: float32[n, 2, 4]\nconstant %c: float32[4]\n%s: float32[n, 2, 4] = aten.mul.Tensor(%q, %c)\n"
        "%r: float32[n, 2, 4] = enginery.attention(%s, %q, %q, 1.0)\noutput r = %r",
        "",
    ),
    "a bias per token": (
        FuseAttentionWithBias(),
        "input %x: float32[n, 16]\ninput %b: float32[n, 16]\n%s: float32[n, 16] = aten.add.Tensor(%x, %b)\n"
        "%r: float32[n, 8] = enginery.gpt_attention(%s, 2, 1, 4)\noutput r = %r",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_stays(name: str) -> None:
    rule, body, reason = UNCHANGED[name]
    report = RewritePatternManager(rule).rewrite(network(body))
    assert report.rewritten == 0
    assert any(reason in declined for declined in report[type(rule).__name__].declined) or not reason


def test_powers_of_two_fold_without_rounding() -> None:
    before = network(
        "input %x: bfloat16[n, 64]\nconstant %w: bfloat16[32, 64]\n%a: bfloat16[n, 32] = aten.linear(%x, %w)\n"
        "%r: bfloat16[n, 32] = aten.mul.Tensor(%a, 0.125)\noutput r = %r"
    )
    after = before.copy()
    assert RewritePatternManager(ScaleIntoLinear()).rewrite(after).rewritten == 1
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    expected, folded = (each.run([x], {"w": weight})[0] for each in (before, after))
    torch.testing.assert_close(folded, expected, rtol=0, atol=0)


def test_folding_in_bfloat16_errs_no_more_than_multiplying() -> None:
    before = network(
        "input %x: bfloat16[n, 512]\nconstant %w: bfloat16[256, 512]\nconstant %c: bfloat16[512]\n"
        "%h: bfloat16[n, 512] = aten.mul.Tensor(%c, %x)\n%r: bfloat16[n, 256] = aten.linear(%h, %w)\noutput r = %r"
    )
    after = before.copy()
    assert RewritePatternManager(ScaleBeforeLinear()).rewrite(after).rewritten == 1
    x, weight, factor = (torch.randn(*shape).bfloat16() for shape in ((64, 512), (256, 512), (512,)))
    exact = torch.nn.functional.linear(x.double() * factor.double(), weight.double())
    constants = {"w": weight, "c": factor}
    plain, folded = ((each.run([x], constants)[0].double() - exact).norm() for each in (before, after))
    assert folded <= 1.2 * plain


def test_scalars_whose_values_are_known_become_numbers() -> None:
    before = network(
        f"{X}constant %c: float32[]\nconstant %d: float32[]\n%a: float32[n, 6] = aten.mul.Tensor(%c, %x)\n"
        "%r: float32[n, 6] = aten.div.Tensor(%a, %d)\noutput r = %r"
    )
    before.values["c"] = torch.tensor(2.5)
    after = f"{X}constant %c: float32[]\nconstant %d: float32[]\n%a: float32[n, 6] = aten.mul.Tensor(%x, 2.5)\n"
    after += "%r: float32[n, 6] = aten.div.Tensor(%a, %d)\noutput r = %r"
    assert_rewrites(before, f"network 1\n{after}\n", ScalarsToNumbers())


def test_a_number_is_that_of_the_constants_dtype() -> None:
    before = network(
        "input %x: bfloat16[n, 6]\nconstant %c: bfloat16[]\n%r: bfloat16[n, 6] = aten.mul.Tensor(%x, %c)\noutput r = %r"
    )
    before.values["c"] = torch.tensor(1.001)
    RewritePatternManager(ScalarsToNumbers()).rewrite(before)
    assert before.layer("mul").args[1] == 1.0
