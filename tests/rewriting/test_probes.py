"""Ten questions about what matching means, with the answers that docs/rewriting.md gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import RewriteError
from enginery.network import Network
from enginery.rewriting import Call, Const, PatternRewriter, RewritePatternManager, Scalar, Var
from enginery.rewriting.numerics import difference, run, sample_values
from rewriting.building import network_of, ops_of


def rule(pattern, rewrite, **attributes):
    return type("Probe", (PatternRewriter,), {"pattern": pattern, "rewrite": rewrite, **attributes})()


def swiglu(self, u, g):
    return torch.sigmoid(g) * (g * u)


@pytest.mark.parametrize("build", [lambda u, g: u * F.silu(g), lambda u, g: F.silu(g) * u])
def test_01_mul_of_silu_matches_in_both_orders(build):
    network = network_of(build)
    report = RewritePatternManager(rule(Var("u") * F.silu(Var("g")), swiglu)).rewrite(network, verify=True)
    assert report["Probe"].rewritten == 1


def test_02_an_intermediate_with_an_outside_user_is_kept_for_it():
    def build(u, g):
        s = F.silu(g)
        return u * s, torch.exp(s)

    network = network_of(build)
    report = RewritePatternManager(rule(Var("u") * F.silu(Var("g")), swiglu)).rewrite(network, verify=True)
    assert report["Probe"].rewritten == 1
    assert ops_of(network).count("silu") == 1
    assert not report["Probe"].rolled_back


def test_03_one_value_may_stand_for_two_variables():
    network = network_of(lambda x: F.silu(x) * x)
    found = (F.silu(Var("g")) * Var("u")).match(network.layer("mul"))
    assert found["g"] is found["u"] is network.tensor("x")
    apart = F.silu(Var("g", distinct=True)) * Var("u")
    assert apart.match(network.layer("mul")) is None


@pytest.mark.parametrize("build", [lambda x: torch.softmax(x, dim=-1), lambda x: torch.softmax(x, -1)])
def test_04_arguments_by_name_and_by_position_are_one_call(build):
    layer = network_of(build).layers[-1]
    assert torch.softmax(Var("x"), -1).match(layer)
    assert torch.softmax(Var("x"), dim=-1).match(layer)


def test_05_a_default_that_is_spelled_out_is_the_default():
    layer = network_of(lambda x, y: torch.add(x, y, alpha=1)).layers[-1]
    assert (Var("x") + Var("y")).match(layer)
    assert torch.add(Var("x"), Var("y"), alpha=1).match(network_of(lambda x, y: x + y).layers[-1])
    assert (Var("x") + Var("y")).match(network_of(lambda x, y: torch.add(x, y, alpha=2)).layers[-1]) is None


def test_06_a_literal_binds_to_a_scalar_and_never_to_a_variable():
    layer = network_of(lambda x: x * 3.0).layers[-1]
    assert (Var("x") * Var("y")).match(layer) is None
    assert (Var("x") * Scalar("y")).match(layer)["y"] == 3.0


def test_07_two_roots_that_share_an_input_are_two_layers():
    class Merge(PatternRewriter):
        pattern = (F.linear(Var("x"), Const("w")), F.linear(Var("x"), Const("v")))

        def rewrite(self, x, w, v):
            both = F.linear(x, torch.cat([w, v]))
            return both[:, :8], both[:, 8:]

    alone = network_of(lambda x, w: F.linear(x, w))
    assert RewritePatternManager(Merge()).rewrite(alone)["Merge"].rewritten == 0
    pair = network_of(lambda x, w, v: (F.linear(x, w), F.linear(x, v)))
    assert RewritePatternManager(Merge()).rewrite(pair, verify=True)["Merge"].rewritten == 1
    assert ops_of(pair).count("linear") == 1


class AddNorm(PatternRewriter):
    """Both the sum and its norm are replaced; the new layers need the weight."""

    total = (Var("x") + Var("r")).bind(escape="return")
    pattern = (Call(torch.rms_norm, total, (8,), Var("weight"), Scalar("eps")), total)

    def rewrite(self, x, r, weight, eps):
        total = torch.sub(x, -r)
        return torch.rms_norm(total, (8,), weight, eps), total


def test_08_an_input_that_is_defined_after_the_first_output_is_moved_or_the_match_is_refused():
    def movable(x, r, b):
        total = x + r
        early = torch.exp(total)
        return torch.rms_norm(total, (8,), torch.tanh(b), 1e-6), early

    network = network_of(movable)
    values = sample_values(network)
    expected = run(network, values)
    report = RewritePatternManager(AddNorm()).rewrite(network)
    assert report["AddNorm"].rewritten == 1
    network.verify()
    assert not difference(expected, run(network, values), network.output_names)

    def circular(x, r, b):
        total = x + r
        return torch.rms_norm(total, (8,), total.mean(0), 1e-6)

    network = network_of(circular)
    before = str(network)
    report = RewritePatternManager(AddNorm()).rewrite(network)
    assert list(report["AddNorm"].declined) == ["the replacement needs mean, which is computed from what it replaces"]
    assert str(network) == before


def test_09_the_type_of_a_new_layer_is_inferred_and_must_fit():
    class Halves(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return F.silu(x.half())

    network = network_of(lambda x: F.silu(x))
    with pytest.raises(RewriteError, match=r"float16\[tokens, 8\] for %silu: float32\[tokens, 8\]"):
        RewritePatternManager(Halves()).rewrite(network)
    declared = type("Declared", (Halves,), {"changes_dtype": True, "pattern": F.silu(Var("x", dtype=torch.float32))})
    RewritePatternManager(declared()).rewrite(network)
    assert network.outputs[0].dtype == torch.float16


def test_10_a_rule_that_raises_half_way_leaves_the_network_as_it_was():
    def half_way(self, x):
        torch.exp(x)
        raise RuntimeError("half way")

    network: Network = network_of(lambda x: F.silu(x))
    before = str(network)
    with pytest.raises(RewriteError, match="Probe raised RuntimeError: half way"):
        RewritePatternManager(rule(F.silu(Var("x")), half_way)).rewrite(network)
    assert str(network) == before
