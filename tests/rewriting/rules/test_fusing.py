"""Rules that change how much work there is: merged and packed linears."""

from __future__ import annotations

import pytest
import torch

from enginery.network import Network
from enginery.ops import PANEL
from enginery.rewriting import RewritePatternManager
from enginery.rewriting.rules.merge_parallel_linears import MergeParallelLinears
from enginery.rewriting.rules.pack_linears import PackLinears, PackTiedEmbedding
from enginery.rewriting.testing import assert_rewrites

X = "input %x: float32[n, 6]\n"


def text(body: str) -> str:
    return f"network 1\n{body}\n"


def network(body: str) -> Network:
    return Network.parse(text(body))


def weights(*rows: int, bias: bool = False) -> str:
    lines = [f"constant %w{i}: float32[{count}, 6]" for i, count in enumerate(rows)]
    lines += [f"constant %b{i}: float32[{count}]" for i, count in enumerate(rows)] if bias else []
    return X + "\n".join(lines) + "\n"


def test_three_linears_become_one() -> None:
    outputs = "output q = %q\noutput k = %k\noutput v = %v"
    before = (
        f"{weights(8, 2, 2)}%q: float32[n, 8] = aten.linear(%x, %w0)\n%k: float32[n, 2] = aten.linear(%x, %w1)\n"
        f"%v: float32[n, 2] = aten.linear(%x, %w2)\n{outputs}"
    )
    after = (
        f"{weights(8, 2, 2)}%c: float32[12, 6] = aten.cat([%w0, %w1, %w2])\n%p: float32[n, 12] = aten.linear(%x, %c)\n"
        "%s: (float32[n, 8], float32[n, 2], float32[n, 2]) = aten.split_with_sizes(%p, [8, 2, 2], dim=-1)\n"
        "output q = %s#0\noutput k = %s#1\noutput v = %s#2"
    )
    assert_rewrites(network(before), text(after), MergeParallelLinears())


def test_biases_are_merged_too() -> None:
    before = (
        f"{weights(3, 5, bias=True)}%p: float32[n, 3] = aten.linear(%x, %w0, bias=%b0)\n"
        "%q: float32[n, 5] = aten.linear(%x, %w1, bias=%b1)\noutput p = %p\noutput q = %q"
    )
    after = (
        f"{weights(3, 5, bias=True)}%b: float32[8] = aten.cat([%b0, %b1])\n%c: float32[8, 6] = aten.cat([%w0, %w1])\n"
        "%p: float32[n, 8] = aten.linear(%x, %c, bias=%b)\n"
        "%s: (float32[n, 3], float32[n, 5]) = aten.split_with_sizes(%p, [3, 5], dim=-1)\n"
        "output p = %s#0\noutput q = %s#1"
    )
    assert_rewrites(network(before), text(after), MergeParallelLinears())


UNMERGED = {
    "one with a bias": "%p: float32[n, 3] = aten.linear(%x, %w0, bias=%b0)\n%q: float32[n, 5] = aten.linear(%x, %w1)",
    "of different inputs": "%y: float32[n, 6] = aten.neg(%x)\n%p: float32[n, 3] = aten.linear(%x, %w0)\n"
    "%q: float32[n, 5] = aten.linear(%y, %w1)",
}


@pytest.mark.parametrize("name", UNMERGED)
def test_linears_that_stay_apart(name: str) -> None:
    before = network(f"{weights(3, 5, bias=True)}{UNMERGED[name]}\noutput p = %p\noutput q = %q")
    assert RewritePatternManager(MergeParallelLinears()).rewrite(before).rewritten == 0


def test_weights_that_are_inputs_are_not_merged() -> None:
    before = network(
        f"{X}input %w0: float32[3, 6]\ninput %w1: float32[3, 6]\n%p: float32[n, 3] = aten.linear(%x, %w0)\n"
        "%q: float32[n, 3] = aten.linear(%x, %w1)\noutput p = %p\noutput q = %q"
    )
    assert RewritePatternManager(MergeParallelLinears()).rewrite(before).rewritten == 0


def test_packing() -> None:
    before = f"{weights(20, bias=True)}%r: float32[n, 20] = aten.linear(%x, %w0, bias=%b0)\noutput r = %r"
    after = (
        f"{weights(20, bias=True)}%p: float32[{-(-20 // PANEL)}, 6, {PANEL}, 1] = enginery.pack_linear(%w0)\n"
        "%r: float32[n, 20] = enginery.packed_linear(%x, %p, 20, bias=%b0)\noutput r = %r"
    )
    assert_rewrites(network(before), text(after), PackLinears())


def test_a_tied_embedding_reads_the_packed_head() -> None:
    head = "input %i: int64[n]\nconstant %w: bfloat16[20, 6]\n"
    before = (
        f"{head}%e: bfloat16[n, 6] = aten.embedding(%w, %i)\n%r: bfloat16[n, 20] = aten.linear(%e, %w)\noutput r = %r"
    )
    network_before = network(before)
    report = RewritePatternManager(PackLinears(), PackTiedEmbedding()).rewrite(network_before)
    network_before.verify()
    assert report["PackTiedEmbedding"].rewritten == report["PackLinears"].rewritten == 1
    assert sum(layer.op._opname == "pack_linear" for layer in network_before) == 1
    weight, indices = torch.randn(20, 6).bfloat16(), torch.tensor([3, 19, 0])
    (found,) = network_before.run([indices], {"w": weight})
    torch.testing.assert_close(found, torch.nn.functional.linear(weight[indices], weight))


def test_an_embedding_of_its_own_stays() -> None:
    before = network(
        "input %i: int64[n]\nconstant %w: float32[20, 6]\n%r: float32[n, 6] = aten.embedding(%w, %i)\noutput r = %r"
    )
    assert RewritePatternManager(PackTiedEmbedding()).rewrite(before).rewritten == 0
