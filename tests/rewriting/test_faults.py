"""The thirteen faults of the original graph rewriting, none of which may come back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery import graph_rewriting as gw
from enginery.errors import EngineryError, RewriteError, RewriteLimitError
from enginery.network import Network
from enginery.rewriting import (
    AnalysisPatternManager,
    Const,
    PatternAnalyzer,
    PatternRewriter,
    RewritePatternManager,
    Var,
)
from rewriting.building import network_of, ops_of

aten = torch.ops.aten


class TanhForSilu(PatternRewriter):
    pattern = F.silu(Var("x"))

    def rewrite(self, x):
        return torch.tanh(x)


def test_01_one_consumer_uses_the_replaced_value_twice():
    def build(x):
        y = F.silu(x)
        return y + y

    network = network_of(build)
    RewritePatternManager(TanhForSilu()).rewrite(network)
    tanh, add = network
    assert add.inputs == [tanh.output, tanh.output]
    network.verify()


def test_02_replacing_an_input_of_a_recorded_call_is_seen_by_the_record():
    network = network_of(lambda x, y: F.silu(x))
    info = gw.FLayerInfo(network.layers[0])
    info.replace_input_with(gw.Tensor._of(network.tensor("x")), gw.Tensor._of(network.tensor("y")))
    assert info.get_input("self").name == "y"
    assert network.layers[0].inputs == [network.tensor("y")]


def test_03_the_signature_of_a_call_can_be_hashed():
    network = network_of(lambda x: torch.split(x, [4, 4], dim=-1)[0])
    one, other = (gw.FLayerInfo(layer) for layer in (network.layers[0], network.copy().layers[0]))
    assert hash(one) == hash(other)
    assert one.signature == other.signature


def test_04_the_most_beneficial_rule_comes_first():
    class Better(TanhForSilu):
        benefit = 10

        def rewrite(self, x):
            return torch.sigmoid(x)

    network = network_of(lambda x: F.silu(x))
    RewritePatternManager(TanhForSilu(), Better()).rewrite(network)
    assert ops_of(network) == ["sigmoid"]


def test_05_a_removed_layer_is_never_offered_again():
    offered = []

    class Watches(PatternRewriter):
        benefit = -1
        root_layer = (aten.silu.default, aten.exp.default)

        def match_and_rewrite(self, layer):
            assert not layer.is_removed
            offered.append(layer.name)

    class Cut(PatternRewriter):
        pattern = F.silu(torch.exp(Var("x")))

        def rewrite(self, x):
            return torch.tanh(x)

    network = network_of(lambda x: (F.silu(torch.exp(x)), torch.relu(x)))
    RewritePatternManager(Cut(), Watches()).rewrite(network)
    assert offered == ["exp"]  # before the rewrite that erased it
    assert ops_of(network) == ["tanh", "relu"]


def test_06_analyzers_skip_removed_layers_match_once_and_get_captures():
    matches = []

    class Roots(PatternAnalyzer):
        root_layer = (aten.silu.default, aten.tanh.default)

        def match(self, layer):
            matches.append(layer.name)
            return True

        def analyze(self, layer):
            return layer.inputs[0].name

    class Pairs(PatternAnalyzer):
        pattern = F.linear(Var("x"), Const("w"))

        def analyze(self, root, x, w):
            return root.name, x.name, w.name

    network = network_of(lambda x, w: F.linear(F.silu(x), w))
    RewritePatternManager(TanhForSilu()).rewrite(network)
    facts = AnalysisPatternManager(Roots(), Pairs()).analyze(network)
    assert matches == ["tanh"]
    assert facts["Roots"] == ["x"]
    assert facts["Pairs"] == [("linear", "tanh", "w")]


def test_06_the_original_dialect_hands_analyze_what_match_returned():
    seen = []

    class Old(gw.PatternAnalyzer):
        def match(self, layer):
            return [layer, layer.get_outputs(0)[0].get_users()[0]] if layer.name == "silu" else False

        def analyze(self, subgraph):
            seen.append([layer.name for layer in subgraph])

    manager = gw.AnalysisPatternManager()
    manager.add("old", Old("old", None))
    manager.analyze(network_of(lambda x: torch.exp(F.silu(x))))
    assert seen == [["silu", "exp"]]


def test_07_an_exception_in_a_recorded_function_is_the_one_that_is_seen_and_poisons_nothing():
    @gw.record_signature
    def inner(fails):
        if fails:
            raise ValueError("the real one")
        return 1

    @gw.record_signature
    def outer(fails):
        return inner(fails) + 1

    with pytest.raises(ValueError, match="the real one"):
        outer(True)
    assert outer(False) == 2


def test_08_the_guard_restores_the_former_network_on_an_exception():
    one, other = Network(), Network()
    with gw.net_guard(one):
        with pytest.raises(KeyError), gw.net_guard(other):
            raise KeyError("inside")
        assert gw.default_net().network is one
    with pytest.raises(EngineryError, match="no current network"):
        gw.default_net()


def test_09_use_lists_are_right_after_every_edit():
    class Check(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, network, x):
            for tensor in [t for layer in network for t in layer.outputs] + list(network.inputs):
                assert tensor.users == [layer for layer in network if tensor in layer.inputs]
            return torch.tanh(x)

    network = network_of(lambda x: (F.silu(x) + F.silu(F.silu(x)), F.silu(x) * 2))
    RewritePatternManager(Check()).rewrite(network)
    assert "silu" not in ops_of(network)


def test_10_the_loop_is_bounded():
    class Forever(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return F.silu(x)

    with pytest.raises(RewriteLimitError, match=r"more than 7 rewrites, the last ones by Forever"):
        RewritePatternManager(Forever()).rewrite(network_of(lambda x: F.silu(x)), limit=7)


def test_11_network_outputs_follow_a_replacement_under_their_names():
    def build(x):
        y = F.silu(x)
        return y, torch.exp(y), y

    network = network_of(build)
    RewritePatternManager(TanhForSilu()).rewrite(network)
    tanh = network.layer("tanh").output
    assert network.output_names == ("out_0", "out_1", "out_2")
    assert [network.outputs[0], network.outputs[2]] == [tanh, tanh]
    other = network_of(build)
    gw.Tensor._of(other.layer("silu").output).replace_all_uses_with(gw.Tensor._of(other.tensor("x")))
    assert other.outputs[0] is other.tensor("x")


def attention_network(add_bias):
    network = Network()
    qkv = network.add_input("qkv", (6, 24), torch.float32)
    bias = network.add_constant("bias", (24,), torch.float32)
    value = network.call(torch.ops.enginery.gpt_attention.default, add_bias(qkv, bias), 2, 1, 6)
    network.set_output("out", value)
    return network


def test_12_attention_without_a_producer_is_left_alone():
    network = attention_network(lambda qkv, bias: qkv)
    before = str(network)
    assert gw.optimize(network)["fuse_attention_with_bias"].rewritten == 0
    assert str(network) == before


def test_12_the_attention_pass_removes_the_old_layer_and_keeps_the_numbers():
    network = attention_network(lambda qkv, bias: bias + qkv)
    values = [torch.randn(6, 24)], {"bias": torch.randn(24)}
    expected = network.run(*values)
    gw.optimize(network)
    assert ops_of(network) == ["gpt_attention"]
    assert network.layers[0].arguments["qkv_bias"] is network.tensor("bias")
    torch.testing.assert_close(network.run(*values), expected)


def test_12_a_failed_attempt_edits_nothing_and_deep_constants_cost_nothing():
    def build(qkv, bias):
        for _ in range(60):
            bias = bias + bias
        return qkv.exp() + qkv, bias

    def sum_of_two_variables(qkv, bias):
        left, _ = build(qkv, bias)
        return left

    network = attention_network(sum_of_two_variables)
    before = str(network)
    gw.optimize(network)
    assert str(network) == before
    deep = attention_network(lambda qkv, bias: qkv + build(qkv, bias)[1])
    assert gw.optimize(deep)["fuse_attention_with_bias"].rewritten == 1


def test_13_arguments_of_a_run_do_not_erase_those_of_a_rule():
    class Old(gw.PatternRewriter):
        def match_and_rewrite(self, layer):
            seen.append(dict(self.args))
            return False

    seen = []
    old = Old("old")
    old.args = {"own": 1, "both": 1}
    manager = gw.RewritePatternManager()
    manager.add("old", old)
    network = network_of(lambda x: F.silu(x))
    manager.rewrite(network)
    manager.rewrite(network, args={"both": 2})
    assert seen == [{"own": 1, "both": 1}, {"own": 1, "both": 2}]


def test_labels_are_unique_in_the_original_dialect_too():
    manager = gw.RewritePatternManager()
    manager.add("one", gw.FuseAttentionWithBiasPass())
    with pytest.raises(RewriteError, match="one"):
        manager.add("one", gw.FuseAttentionWithBiasPass())
