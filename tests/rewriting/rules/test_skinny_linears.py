"""The GPU's own linear takes the place of those whose weights are constants of 16 bits, and of no others."""

from __future__ import annotations

import pytest
import torch

from enginery.network import Network
from enginery.rewriting import RewritePatternManager
from enginery.rewriting.rules.skinny_linears import SkinnyLinears
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
