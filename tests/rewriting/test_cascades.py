"""Chains of rewrites that each enable the next: the number of offers grows with the number of changes, no faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager, Scalar, Var
from rewriting.building import ops_of

aten = torch.ops.aten


class SinkTranspose(PatternRewriter):
    """relu(transpose(x))  ->  transpose(relu(x)): starts at the top"""

    pattern = F.relu(aten.transpose.int(Var("x"), Scalar("a"), Scalar("b")))

    def rewrite(self, x, a, b):
        return torch.transpose(F.relu(x), a, b)


class HoistTranspose(PatternRewriter):
    """transpose(relu(x))  ->  relu(transpose(x)): starts at the bottom"""

    pattern = aten.transpose.int(F.relu(Var("x")), Scalar("a"), Scalar("b"))

    def rewrite(self, x, a, b):
        return F.relu(torch.transpose(x, a, b))


class MergeIntoUser(PatternRewriter):
    """x + 1 whose only user adds a larger number takes that addition over: works backwards from the last one"""

    root_layer = (aten.add.Tensor,)

    def match_and_rewrite(self, layer):
        users = layer.output.users
        if len(users) != 1 or users[0].op is not layer.op or users[0].args[1] == 1 or layer.output.is_output:
            return None
        (user,) = users
        return {user: layer.args[0] + (layer.args[1] + user.args[1])}


def chain(depth, build):
    network = Network()
    network.set_output("out", build(network.add_input("x", (4, 8), torch.float32), depth))
    return network


def relus(x, depth):
    for _ in range(depth):
        x = F.relu(x)
    return x


def additions(x, depth):
    for _ in range(depth):
        x = x + 1
    return x + 2


CASES = {
    "sink": (SinkTranspose, lambda x, depth: relus(torch.transpose(x, 0, 1), depth)),
    "hoist": (HoistTranspose, lambda x, depth: torch.transpose(relus(x, depth), 0, 1)),
    "merge backwards": (MergeIntoUser, additions),
}


@pytest.mark.parametrize("name", CASES)
def test_offers_are_linear_in_the_depth(name):
    rule, build = CASES[name]
    tried = {}
    for depth in (100, 200, 400):
        network = chain(depth, build)
        report = RewritePatternManager(rule()).rewrite(network)
        assert report.rewritten == depth
        tried[depth] = report[rule.__name__].tried
        network.verify()
    assert tried[400] - tried[200] <= 2 * (tried[200] - tried[100]) + 4
    assert tried[400] <= 4 * 400


def test_what_the_cascades_leave():
    network = chain(50, CASES["sink"][1])
    RewritePatternManager(SinkTranspose()).rewrite(network, verify=True)
    assert ops_of(network) == ["relu"] * 50 + ["transpose"]
    network = chain(50, CASES["hoist"][1])
    RewritePatternManager(HoistTranspose()).rewrite(network, verify=True)
    assert ops_of(network) == ["transpose"] + ["relu"] * 50
    network = chain(50, CASES["merge backwards"][1])
    RewritePatternManager(MergeIntoUser()).rewrite(network, verify=True)
    assert [layer.args[1] for layer in network] == [52]


def test_an_inner_change_is_seen_by_roots_as_far_away_as_patterns_reach():
    class Inner(PatternRewriter):
        pattern = torch.abs(Var("x"))

        def rewrite(self, x):
            return torch.exp(x)

    class Outer(PatternRewriter):
        benefit = 5
        pattern = torch.tanh(F.relu(torch.sigmoid(torch.exp(Var("x")))))

        def rewrite(self, x):
            return torch.cos(x)

    class Late(PatternRewriter):
        """reached only if the root is offered again after Inner"""

        root_layer = (torch.ops.aten.neg,)

        def match_and_rewrite(self, layer):
            return None

    network = chain(0, lambda x, _: torch.tanh(F.relu(torch.sigmoid(torch.abs(x)))))
    RewritePatternManager(Inner(), Outer(), Late()).rewrite(network)
    assert ops_of(network) == ["cos"]


def test_losing_a_user_makes_a_single_use_pattern_match():
    class Drop(PatternRewriter):
        pattern = torch.sigmoid(torch.exp(Var("x")))

        def rewrite(self, x):
            return torch.cos(x)

    class Single(PatternRewriter):
        benefit = 5
        pattern = torch.tanh(torch.exp(Var("x")).bind(users=1))

        def rewrite(self, x):
            return torch.sin(x)

    network = Network()
    e = torch.exp(network.add_input("x", (4, 8), torch.float32))
    network.set_output("a", torch.tanh(e))
    network.set_output("b", torch.sigmoid(e))
    RewritePatternManager(Single(), Drop()).rewrite(network)
    assert sorted(ops_of(network)) == ["cos", "sin"]


def test_a_hundred_rules_that_do_not_apply_are_not_tried():
    rules = [
        type(
            f"Rule{i}", (PatternRewriter,), {"pattern": torch.atan2(Var("x"), Var("y")), "rewrite": lambda self: None}
        )()
        for i in range(100)
    ]
    report = RewritePatternManager(*rules, SinkTranspose()).rewrite(chain(50, CASES["sink"][1]))
    assert all(report[f"Rule{i}"].tried == 0 for i in range(100))
