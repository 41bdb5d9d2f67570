"""The GPU's own linear takes the place of those whose weights are constants of 16 bits, and of no others."""

from __future__ import annotations

import pytest
import torch

from enginery.network import Network
from enginery.rewriting import RewritePatternManager
from enginery.rewriting.rules.skinny_linears import SkinnyLinears
from enginery.rewriting.rules.weights_ahead import WeightsAhead
from enginery.rewriting.testing import assert_rewrites


def text(op: str, dtype: str = "bfloat16", weight: str = "constant") -> str:
    return (
        f"network 1\ninput %x: {dtype}[2, n, 6]\n{weight} %w: {dtype}[5, 6]\nconstant %b: {dtype}[5]\n"
        f"%y: {dtype}[2, n, 5] = {op}(%x, %w, bias=%b)\noutput y = %y\n"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_linear_of_16_bits(dtype: str) -> None:
    assert_rewrites(
        Network.parse(text("aten.linear", dtype)), Network.parse(text("enginery.linear", dtype)), SkinnyLinears()
    )


@pytest.mark.parametrize(
    ("dtype", "weight", "reason"),
    [
        ("float32", "constant", f"its operands are {torch.float32} and {torch.float32}"),
        ("bfloat16", "input", "its weight is no constant matrix"),
    ],
)
def test_others_stay(dtype: str, weight: str, reason: str) -> None:
    network = Network.parse(text("aten.linear", dtype, weight))
    report = RewritePatternManager(SkinnyLinears()).rewrite(network)
    assert report.rewritten == 0
    assert report["SkinnyLinears"].declined == {reason: 1}


CHAIN = """network 1
input %x: bfloat16[n, 6]
constant %a: bfloat16[6, 6]
constant %b: bfloat16[6, 6]
constant %c: bfloat16[6, 6]
%p: bfloat16[n, 6] = enginery.linear(%x, %a{0}) @layers.0.first
%q: bfloat16[n, 6] = aten.silu(%p) @layers.0
%r: bfloat16[n, 6] = enginery.linear(%q, %b) @layers.0.second
%s: bfloat16[n, 6] = enginery.linear(%r, %c) @layers.1.first
output y = %s
"""


def test_a_linear_asks_for_the_weight_of_the_next_in_its_block() -> None:
    """And not for that of another block, which would make equal blocks differ."""
    assert_rewrites(Network.parse(CHAIN.format("")), Network.parse(CHAIN.format(", following=%b")), WeightsAhead())
