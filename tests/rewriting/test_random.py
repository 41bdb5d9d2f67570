"""Sound rules over random networks: the structure holds and the outputs stay equal. Two matchers agree."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from enginery.errors import RewriteError
from enginery.rewriting import Const, OneOf, Optional, PatternRewriter, RewritePatternManager, Scalar, Through, Var
from enginery.rewriting.explain import why
from enginery.rewriting.matcher import Matcher
from enginery.rewriting.pattern import Call, Chain
from enginery.rewriting.structure import structure
from network.strategies import inputs_for, networks

aten = torch.ops.aten


class SiluByHand(PatternRewriter):
    pattern = F.silu(Var("x"))

    def rewrite(self, x):
        return x * torch.sigmoid(x)


class SiluBack(PatternRewriter):
    pattern = Var("x") * torch.sigmoid(Var("x"))

    def rewrite(self, x):
        return F.silu(x)


class SquareTwice(PatternRewriter):
    pattern = torch.square(Var("x"))

    def rewrite(self, x):
        return x * x


class SubtractionToAddition(PatternRewriter):
    pattern = Var("x") - Var("y")

    def rewrite(self, x, y):
        return x + (-y)


class FoldBias(PatternRewriter):
    pattern = Call(F.linear, Var("x"), Const("w"), None) + Const("b", rank=1)

    def rewrite(self, root, x, w, b):
        return F.linear(x, w, b) if b.shape == (w.shape[0],) and root.output.shape[-1] == w.shape[0] else None


class MergeLinears(PatternRewriter):
    pattern = (Call(F.linear, Var("x"), Const("w"), None), Call(F.linear, Var("x"), Const("v"), None))

    def rewrite(self, x, w, v):
        return torch.split(F.linear(x, torch.cat([w, v])), [w.shape[0], v.shape[0]], dim=-1)


class DropTransposes(PatternRewriter):
    pattern = aten.transpose.int(aten.transpose.int(Var("x"), Scalar("a"), Scalar("b")), Scalar("a"), Scalar("b"))

    def rewrite(self, x):
        return x


class NegationOutside(PatternRewriter):
    pattern = torch.relu(torch.neg(Var("x")).bind(escape="clone"))

    def rewrite(self, x):
        return torch.neg(torch.clamp_max(x, 0.0))


SOUND = (SiluByHand, SquareTwice, SubtractionToAddition, FoldBias, MergeLinears, DropTransposes, NegationOutside)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def check(network, rules):
    inputs, constants = inputs_for(network)
    before, text = network.run(inputs, constants), structure(network)
    copy = network.copy()
    report = RewritePatternManager(*rules).rewrite(network)
    network.verify()
    after = network.run(inputs, constants)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4, equal_nan=True)
    assert structure(copy) == text
    return report


@quick
@given(networks(), st.permutations(SOUND), st.integers(1, len(SOUND)))
def test_sound_rules_keep_structure_and_numbers(network, order, count):
    report = check(network, [rule() for rule in order[:count]])
    for fact in report.rules.values():
        assert fact.rewritten <= fact.matched <= fact.tried


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(max_layers=20), st.permutations(SOUND))
def test_sound_rules_on_a_thousand_networks(network, order):
    check(network, [rule() for rule in order])


@quick
@given(networks())
def test_inverse_rules_give_the_network_back(network):
    RewritePatternManager(SiluBack()).rewrite(network)
    before = structure(network)
    RewritePatternManager(SiluByHand()).rewrite(network)
    RewritePatternManager(SiluBack()).rewrite(network)
    assert structure(network) == before


class Explodes(Exception):
    pass


@quick
@given(networks(), st.integers(0, 6))
def test_a_rule_that_raises_at_any_moment_leaves_a_network_as_before_it(network, moment):
    done = []

    class Raises(PatternRewriter):
        root_layer = None

        def match_and_rewrite(self, layer):
            if len(done) == moment:
                torch.exp(layer.outputs[0]) if layer.outputs[0].dtype == torch.float32 else None
                raise Explodes
            done.append(layer)

    text = str(network)
    with pytest.raises(RewriteError) if len(network) > moment else nullcontext():
        RewritePatternManager(Raises()).rewrite(network)
    assert str(network) == text
    network.verify()


leaves = st.sampled_from(["x", "y", "x"]).map(Var) | st.just("c").map(Const)


def _calls(inner):
    unary = st.sampled_from([F.silu, torch.relu, torch.tanh, torch.sigmoid, torch.neg])
    binary = st.sampled_from([torch.add, torch.sub, torch.mul, torch.maximum])
    return st.one_of(
        st.builds(lambda f, p: f(p), unary, inner),
        st.builds(lambda f, p, q: f(p, q), binary, inner, inner),
        st.builds(lambda p, bias: Call(F.linear, p, Const("w"), Optional(bias)), inner, st.just("b").map(Const)),
        st.builds(lambda p, q: OneOf(torch.relu(p), torch.add(q, p)), inner, inner),
        st.builds(lambda p: torch.relu(Through(p, views=True, casts=True)), inner),
        st.builds(lambda p: torch.tanh(p).bind(escape="forbid"), inner),
        st.builds(lambda p: Chain(torch.add, p, rest="rest"), inner),
        st.builds(lambda p: torch.mul(p, p), inner),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.recursive(leaves, _calls, max_leaves=4).filter(lambda p: p.root_ops()))
def test_the_compiled_matcher_and_the_explaining_one_agree(network, pattern):
    matcher = Matcher((pattern,))
    for layer in network:
        if matcher.accepts(layer):
            matched, _ = matcher.attempt(layer)
            assert matched == (why((pattern,), layer) is None)
