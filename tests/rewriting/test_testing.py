"""The helpers for testing rules, and analyzers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import RewriteError, UsageError
from enginery.network import Dim
from enginery.rewriting import AnalysisPatternManager, Const, PatternAnalyzer, PatternRewriter, Scalar, Var
from enginery.rewriting.pattern import Call
from enginery.rewriting.testing import assert_rewrites, equivalence_test
from rewriting.building import network_of


class FoldBias(PatternRewriter):
    pattern = F.linear(Var("x"), Const("w")) + Const("b", rank=1)

    def rewrite(self, x, w, b):
        return F.linear(x, w, b)


class Before(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(8, 8))
        self.b = torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.relu(F.linear(x, self.w) + self.b)


class After(Before):
    def forward(self, x):
        return F.relu(F.linear(x, self.w, self.b))


class Other(Before):
    def forward(self, x):
        return F.silu(F.linear(x, self.w, self.b))


def test_modules_before_and_after():
    report = assert_rewrites(Before(), After(), FoldBias(), args=(torch.randn(3, 8),))
    assert report["FoldBias"].rewritten == 1
    with pytest.raises(AssertionError, match="not the expected one"):
        assert_rewrites(Before(), Other(), FoldBias(), args=(torch.randn(3, 8),))


def test_networks_and_text_and_the_order_of_names():
    before = network_of(lambda x, w, b: F.linear(x, w) + b)
    after = network_of(lambda x, w, b: F.linear(x, w, b))
    assert_rewrites(before, after, FoldBias())
    assert_rewrites(before, str(after), FoldBias())
    assert len(before) == 2


def test_nothing_rewritten_says_why():
    with pytest.raises(AssertionError, match="nothing was rewritten: FoldBias: nearest miss at add: relu"):
        assert_rewrites(network_of(lambda x, b: F.relu(x) + b), network_of(lambda x: x), FoldBias())


def test_a_rule_of_the_right_structure_with_wrong_numbers_is_found_out():
    class Wrong(PatternRewriter):
        pattern = F.relu(Var("x"))

        def rewrite(self, x):
            return torch.abs(x)

    with pytest.raises(AssertionError, match="computes something else"):
        assert_rewrites(network_of(lambda x: F.relu(x)), network_of(lambda x: torch.abs(x)), Wrong())


def test_generated_equivalence_with_scalars_and_two_roots():
    class AddNorm(PatternRewriter):
        total = (Var("x") + Var("r")).bind(escape="return")
        pattern = (Call(torch.rms_norm, total, Scalar("shape"), Const("weight"), Scalar("eps")), total)

        def rewrite(self, x, r, shape, weight, eps):
            total = torch.sub(x, -r)
            return torch.rms_norm(total, shape, weight, eps), total

    equivalence_test(AddNorm())()
    equivalence_test(AddNorm(), eps=1e-3, shape=(8,))()


def test_what_cannot_be_made_up_is_said():
    class Imperative(PatternRewriter):
        def match_and_rewrite(self, layer):
            return None

    with pytest.raises(UsageError, match="no pattern to make a test from"):
        equivalence_test(Imperative())


class Parameters(PatternAnalyzer):
    pattern = F.linear(Var("x"), Const("w"))

    def analyze(self, root, w, args):
        assert not isinstance(w.shape[0], Dim)
        return root.name, w.shape[0] * w.shape[1] * args.get("bytes", 4)


def test_analyzers_give_facts_with_captures_and_arguments():
    network = network_of(lambda x, w, v: F.linear(F.linear(x, w), v))
    facts = AnalysisPatternManager(Parameters()).analyze(network, args={"bytes": 2})
    assert facts["Parameters"] == [("linear", 128), ("linear_1", 128)]


@pytest.mark.parametrize(
    "change",
    [
        lambda root, network: root.output.replace_all_uses_with(root.inputs[0]),
        lambda root, network: torch.exp(root.output),
        lambda root, network: network.set_output("more", root.output),
    ],
)
def test_an_analyzer_cannot_change_the_network(change):
    class Changes(PatternAnalyzer):
        pattern = F.relu(Var("x"))

        def analyze(self, root, network):
            change(root, network)

    network = network_of(lambda x: F.relu(x))
    before = str(network)
    with pytest.raises(RewriteError, match="analyzer Changes raised the network may not be changed") as caught:
        AnalysisPatternManager(Changes()).analyze(network)
    assert (caught.value.rule, caught.value.layer) == ("Changes", "relu")
    assert str(network) == before
