"""Twenty-two things that no other rewriting system has together, each by its number in docs/rewriting.md."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import RewriteError
from enginery.network import Network, Provenance
from enginery.rewriting import (
    AnyOp,
    Call,
    Chain,
    Const,
    OneOf,
    Optional,
    PatternRewriter,
    RewritePatternManager,
    Scalar,
    Through,
    Var,
    Vars,
    explain,
    same_dtype,
    same_shape,
)
from enginery.rewriting.overlaps import overlaps
from enginery.rewriting.testing import equivalence_test
from rewriting.building import network_of, ops_of

aten = torch.ops.aten


def rule(pattern, rewrite=lambda self: None, name="Rule", **attributes):
    return type(name, (PatternRewriter,), {"pattern": pattern, "rewrite": rewrite, **attributes})()


def rewritten(network, *rules):
    return RewritePatternManager(*rules).rewrite(network).rewritten


def test_01_why_it_did_not_match_for_all_rules_at_once():
    network = network_of(lambda x, y, w: F.silu(F.linear(x, w)) * F.relu(x))
    manager = RewritePatternManager(
        rule(F.silu(F.linear(Var("x"), Const("w"))) * F.sigmoid(Var("x")), name="Deep"),
        rule(F.silu(Var("x")) * F.relu(Var("x")), name="Same"),
        rule(F.gelu(Var("x")), name="Absent"),
        rule(F.relu(Var("x")), name="Fits", rewrite=lambda self, x: F.silu(x)),
        rule(F.relu(Var("x")), name="Declines"),
        rule(F.relu(Var("x")), name="Checked", check=lambda self, x: x.name == "y"),
    )
    misses = manager.explain(network)
    assert str(misses["Deep"]) == "Deep: nearest miss at mul: relu (aten.relu) is not aten.sigmoid"
    assert str(misses["Same"]) == "Same: nearest miss at mul: x is linear (aten.linear) already, not x (input)"
    assert str(misses["Absent"]) == "Absent: the network has no aten.gelu"
    assert misses["Fits"] is None
    assert "nearest miss at relu: its code declines by `def rule(" in str(misses["Declines"])
    assert misses["Checked"].reason == "check returned False"


def test_01_the_reason_is_that_of_the_deepest_attempt():
    def build(x, y, w, b):
        return F.relu(F.silu(F.linear(x, w, b)) * 2), F.relu(torch.exp(y))

    pattern = F.relu(F.silu(F.linear(Var("x"), Const("w"))) * Scalar("s"))
    miss = explain(network_of(build), rule(pattern))
    assert miss.layer == "relu"
    assert "argument bias of linear is b (constant), not None" in miss.reason


def test_01_explaining_is_only_done_when_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("enginery.rewriting.manager.nearest_miss", lambda network, bound: asked.append(bound.label))
    manager = RewritePatternManager(rule(F.relu(Var("x")) * Scalar("s"), name="Missed"))
    network = network_of(lambda x: torch.exp(x) * 2)
    manager.rewrite(network, verify=True)
    assert asked == []
    manager.explain(network)
    assert asked == ["Missed"]


def test_02_an_expectation_that_is_not_met_fails_by_name():
    class Fuse(PatternRewriter):
        pattern = F.silu(Var("x"))
        expect = 3

        def rewrite(self, x):
            return torch.sigmoid(x) * x

    network = network_of(lambda x: F.silu(F.silu(x)))
    before = str(network)
    with pytest.raises(RewriteError, match="rule Fuse applied 2 times where 3 were expected") as caught:
        RewritePatternManager(Fuse()).rewrite(network)
    assert caught.value.rule == "Fuse"
    assert str(network) == before
    Fuse.expect = 2
    assert RewritePatternManager(Fuse()).rewrite(network)["Fuse"].expected == 2


def test_02_in_each_layer():
    class Fuse(PatternRewriter):
        pattern = F.silu(Var("x"))
        expect = "each layer"

        def rewrite(self, x):
            return torch.sigmoid(x) * x

    def blocks(leave_out):
        network = network_of(lambda x: x)
        x = network.tensor("x")
        for i in range(3):
            with network.inserting_before(None, module_path=f"model.layers.{i}.mlp"):
                x = torch.relu(x) if i == leave_out else F.silu(x)
        network.set_output("out_0", x)
        return network

    assert RewritePatternManager(Fuse()).rewrite(blocks(None))["Fuse"].rewritten == 3
    with pytest.raises(RewriteError, match=r"Fuse did not apply in model\.layers\.1"):
        RewritePatternManager(Fuse()).rewrite(blocks(1))


def test_03_through_views_and_casts_as_declared_on_the_edge():
    layer = network_of(lambda x: F.silu(torch.exp(x).double().view(-1, 2, 4))).layers[-1]
    assert F.silu(torch.exp(Var("x"))).match(layer) is None
    assert F.silu(Through(torch.exp(Var("x")), views=True)).match(layer) is None
    assert F.silu(Through(torch.exp(Var("x")), views=True, casts=True)).match(layer) is not None


def test_04_several_outputs_are_reordered_locally_or_refused():
    class Split(PatternRewriter):
        first = torch.exp(Var("x"))
        pattern = (first + Var("late"), first)

        def rewrite(self, x, late):
            first = torch.exp(x * 1.0)
            return torch.sub(first, -late), first

    def build(x, y):
        first = torch.exp(x)
        early = torch.relu(first)
        return first + torch.tanh(y), early

    network = network_of(build)
    report = RewritePatternManager(Split()).rewrite(network, verify=True)
    assert report["Split"].rewritten == 1
    assert not report["Split"].rolled_back
    cyclic = network_of(lambda x: (lambda first: first + torch.relu(first))(torch.exp(x)))
    assert "computed from what it replaces" in next(
        iter(RewritePatternManager(Split()).rewrite(cyclic)["Split"].declined)
    )


def test_05_new_layers_have_types_at_once_and_symbols_stay():
    seen = []

    def rewrite(self, x):
        wide = torch.cat([x, x], dim=-1)
        seen.append((str(wide.shape), wide.dtype))
        return wide[:, :8]

    network = network_of(lambda x: F.silu(x))
    assert rewritten(network, rule(F.silu(Var("x")), rewrite)) == 1
    assert seen == [("(tokens, 16)", torch.float32)]
    assert str(network.outputs[0].shape) == "(tokens, 8)"


def test_06_relations_between_captures():
    pattern = Var("x") + Var("y")
    same = rule(pattern, lambda self, x, y: torch.sub(x, -y), where=[same_shape("x", "y"), same_dtype("x", "y")])
    assert rewritten(network_of(lambda x, y: x + y), same) == 1
    network = network_of(lambda x, b: x + b)
    report = RewritePatternManager(same).rewrite(network)
    assert dict(report["Rule"].declined) == {"shapes of x and y differ": 1}
    assert explain(network, same).reason == "shapes of x and y differ"
    with pytest.raises(RewriteError, match="names 'z'"):
        RewritePatternManager(rule(pattern, where=[same_shape("x", "z")]))


def test_07_commutative_and_associative():
    layer = network_of(lambda x, y, b: (b + F.relu(x)) + y).layers[-1]
    assert Chain(torch.add, Var("y"), F.relu(Var("x")), Const("b")).match(layer) is not None
    assert (Var("y") + (F.relu(Var("x")) + Const("b"))).match(layer) is not None


def test_07_a_long_sum_in_any_order_and_bracketing():
    layer = network_of(lambda x, y, z, u, b: ((x.exp() + y) + (z + F.relu(u))) + b).layers[-1]
    parts = [torch.exp(Var("e")), F.relu(Var("r")), Const("c"), Var("v"), Var("w")]
    for order in permutations(parts):
        found = Chain(torch.add, *order).match(layer)
        assert {found[name].name for name in "ercvw"} == {"x", "u", "b", "y", "z"}
    assert Chain(torch.add, *parts, torch.tanh(Var("t"))).match(layer) is None


def test_08_variadic_captures():
    network = network_of(lambda x, y, z: torch.cat([x, y, z], dim=0))

    def rewrite(self, parts):
        return torch.cat([torch.cat(parts[:2]), *parts[2:]])

    flat = rule(torch.cat(Vars("parts", at_least=3)), rewrite)
    assert rewritten(network, flat) == 1
    assert ops_of(network) == ["cat", "cat"]


def test_09_optional_operands():
    pattern = Call(F.linear, Var("x"), Const("w"), Optional(Const("b")))
    scaled = rule(F.relu(pattern), lambda self, x, w, b: torch.clamp_min(F.linear(x, w, b), 0.0))
    assert rewritten(network_of(lambda x, w: F.relu(F.linear(x, w))), scaled) == 1
    assert rewritten(network_of(lambda x, w, b: F.relu(F.linear(x, w, b))), scaled) == 1


def test_10_one_of_and_any_op():
    pattern = OneOf(F.silu(AnyOp(Var("x"))), F.gelu(AnyOp(Var("x"))))
    for activation in (F.silu, F.gelu):
        assert pattern.match(network_of(lambda x: activation(torch.exp(x))).layers[-1])["x"].name == "x"  # noqa: B023


def test_11_scalars_are_captured_or_compared_never_ignored():
    layer = network_of(lambda x: torch.clamp(x, 0.0, 6.0)).layers[-1]
    assert torch.clamp(Var("x"), 0.0, 6.0).match(layer)
    assert torch.clamp(Var("x"), 0.0, 5.0).match(layer) is None
    assert torch.clamp(Var("x"), 0.0).match(layer) is None
    assert Call(torch.clamp, Var("x"), Scalar("low"), Scalar("high")).match(layer)["high"] == 6.0


def test_12_injectivity_is_the_authors_choice():
    one = network_of(lambda x: (lambda e: e + e)(torch.exp(x))).layers[-1]
    two = network_of(lambda x: torch.exp(x) + torch.exp(x)).layers[-1]
    apart = torch.exp(Var("a")) + torch.exp(Var("b"))
    together = torch.exp(Var("a")) + torch.exp(Var("b")).bind(distinct=False)
    assert [apart.match(one) is None, apart.match(two) is None] == [True, False]
    assert [together.match(one) is None, together.match(two) is None] == [False, False]
    aliased = network_of(lambda x: x * x).layers[-1]
    assert (Var("a") * Var("b")).match(aliased)
    assert (Var("a") * Var("b", distinct=True)).match(aliased) is None


def escaping(policy, rewrite=None):
    inner = torch.exp(Var("x")).bind("inner", escape=policy)
    fused = lambda self, x: torch.sigmoid(x) * torch.expm1(x)  # noqa: E731
    return rule(torch.relu(inner), rewrite or fused)


def escape_network():
    def build(x):
        e = torch.exp(x)
        return torch.relu(e), torch.tanh(e)

    return network_of(build)


def test_13_escaping_intermediates_keep_and_forbid():
    network = escape_network()
    assert rewritten(network, escaping("keep")) == 1
    assert "exp" in ops_of(network)
    network = escape_network()
    report = RewritePatternManager(escaping("forbid")).rewrite(network)
    assert dict(report["Rule"].declined) == {"an inner value has a user outside": 1}
    assert "exp is read outside the match" in explain(network, escaping("forbid")).reason


def test_13_escaping_intermediates_clone_and_return():
    network = escape_network()
    assert rewritten(network, escaping("clone")) == 1
    layers = network.layers
    exp = next(layer for layer in layers if layer.name.startswith("exp") and layer.op is aten.exp.default)
    assert layers.index(exp) + 1 == layers.index(network.layer("tanh"))
    network.verify()
    network = escape_network()
    with pytest.raises(RewriteError, match="no replacement for exp"):
        rewritten(network, escaping("return"))
    both = escaping("return", lambda self, root, inner, x: {root: torch.sigmoid(x), inner: torch.expm1(x)})
    assert rewritten(network, both) == 1
    assert "exp" not in ops_of(network)


def cache_network(between):
    """reads a cache, has it written in between or not, and uses what was read"""
    network = Network()
    query = network.add_input("query", (2, 1, 4), torch.float32)
    pools = [network.add_input(name, (3, 1, 16, 4), torch.float32) for name in ("keys", "values")]
    tables = [
        network.add_input("slots", (2,), torch.int64), network.add_input("blocks", (1, 1), torch.int32),
        network.add_input("starts", (2,), torch.int32), network.add_input("lengths", (1,), torch.int32),
    ]  # fmt: skip
    read = torch.exp(pools[0])
    if between:
        attended = network.call(torch.ops.enginery.paged_attention.default, query, query, query, *pools, *tables, 0.5)
        network.set_output("attended", attended)
    network.set_output("out", torch.relu(read))
    return network


def test_14_effects_are_barriers():
    late_read = rule(torch.relu(torch.exp(Var("x"))), lambda self, x: torch.exp(torch.clamp(x, -50.0)))
    assert rewritten(cache_network(between=False), late_read) == 1
    report = RewritePatternManager(late_read).rewrite(cache_network(between=True))
    assert dict(report["Rule"].declined) == {"it would read keys after paged_attention wrote to it": 1}
    drop = rule(torch.ops.enginery.paged_attention.default(Var("q"), ...), lambda self, q: q)
    report = RewritePatternManager(drop).rewrite(cache_network(between=True))
    assert dict(report["Rule"].declined) == {"it would remove the effect of paged_attention": 1}
    allowed = type("Allowed", (type(drop),), {"removes_effects": True})()
    assert rewritten(cache_network(between=True), allowed) == 1


def test_14_unused_calls_with_effects_stay():
    network = cache_network(between=True)
    network.set_output("attended", network.tensor("query"))
    late = rule(torch.relu(Var("x")), lambda self, x: torch.clamp_min(x, 0.0))
    rewritten(network, late)
    assert "paged_attention" in ops_of(network)


def test_14_random_numbers_are_effects():
    def dropped(training):
        return network_of(lambda x: torch.relu(F.dropout(x, 0.5, training=training)))

    drop = rule(aten.dropout.default(Var("x"), ...), lambda self, x: x)
    report = RewritePatternManager(drop).rewrite(dropped(training=True))
    assert dict(report["Rule"].declined) == {"it would remove the effect of dropout": 1}
    assert rewritten(dropped(training=False), drop) == 1
    around = rule(torch.relu(aten.dropout.default(Var("x"), ...)), lambda self, x: torch.clamp_min(x, 0.0))
    network = dropped(training=True)
    assert rewritten(network, around) == 1
    assert "dropout" in ops_of(network)  # it draws as before: later random numbers stay the same


def test_15_symbolic_sizes_are_no_users():
    network = network_of(lambda x: torch.exp(x).view(x.shape[0], 2, 4))
    exp, view = network
    assert exp.output.users == [view]
    assert aten.view(torch.exp(Var("x")).bind(users=1), Scalar("shape")).match(view) is not None


def test_16_a_rewrite_is_a_transaction():
    class Bad(PatternRewriter):
        pattern = torch.tanh(Var("x"))

        def rewrite(self, x):
            return torch.exp(x)

    network = network_of(lambda x: torch.tanh(F.silu(x)))
    good = rule(F.silu(Var("x")), lambda self, x: x * torch.sigmoid(x), name="Good")
    report = RewritePatternManager(good, Bad()).rewrite(network, verify=True)
    assert ops_of(network) == ["sigmoid", "mul", "tanh"]
    assert report["Bad"].rolled_back
    assert not report["Good"].rolled_back


def test_17_a_loop_names_its_rules_and_layer():
    to = rule(F.relu(Var("x")), lambda self, x: torch.abs(x), name="To")
    fro = rule(torch.abs(Var("x")), lambda self, x: F.relu(x), name="Fro")
    with pytest.raises(RewriteError, match=r"(?=.*To \d+ times)(?=.*Fro \d+ times).*at layer (relu|abs)_\d+"):
        RewritePatternManager(to, fro).rewrite(network_of(lambda x: F.relu(x)))


def test_18_counts_per_rule_are_always_on():
    picky = rule(F.silu(Var("x")), lambda self, x: torch.tanh(x), check=lambda self, x: x.name == "y")
    fact = RewritePatternManager(picky).rewrite(network_of(lambda x, y: (F.silu(x), F.silu(y))))["Rule"]
    assert (fact.tried, fact.matched, fact.rewritten, sum(fact.declined.values())) == (2, 2, 1, 1)
    assert fact.milliseconds > 0


def test_19_overlaps_and_order_dependence():
    fold = rule(F.linear(Var("x"), Const("w")) + Const("b"), lambda self, x, w, b: F.linear(x, w, b), name="Fold")
    shift = rule(Var("x") + Const("b"), lambda self, x, b: torch.sub(x, -b), name="Shift")
    alone = rule(F.silu(Var("x")), lambda self, x: torch.sigmoid(x) * x, name="Alone")
    network = network_of(lambda x, w, b: F.silu(F.linear(x, w) + b))
    before = str(network)
    report = overlaps(network, [fold, shift, alone])
    assert str(network) == before
    ((pair),) = report
    assert (pair.first, pair.second, pair.layers) == ("Fold", "Shift", ("add",))
    assert pair.order_matters
    assert "Fold and Shift both match at add" in str(pair)


def test_20_the_equivalence_test_comes_from_the_rule():
    fold = rule(
        F.linear(Var("x"), Const("w")) + Const("b", rank=1), lambda self, x, w, b: F.linear(x, w, b), name="Fold"
    )
    equivalence_test(fold)()
    wrong = rule(F.relu(Var("x")), lambda self, x: torch.abs(x), name="Wrong")
    with pytest.raises(AssertionError, match="Wrong changes the result"):
        equivalence_test(wrong)()
    never = rule(F.relu(Var("x")), lambda self, x: None, name="Never")
    with pytest.raises(AssertionError, match="did not apply to its own pattern"):
        equivalence_test(never)()


def test_22_provenance_of_each_new_layer():
    network = network_of(lambda x: torch.exp(F.silu(x)))
    rewritten(network, rule(torch.exp(F.silu(Var("x"))), lambda self, x: torch.exp(x * torch.sigmoid(x)), name="Open"))
    assert {layer.provenance for layer in network} == {Provenance("Open", ("exp", "silu"))}
