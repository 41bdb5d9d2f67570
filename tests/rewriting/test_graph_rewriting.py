"""Code written against TensorRT-LLM 0.5's module, moved over by changing its import."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from enginery import ops, rewriting
from enginery.errors import RewriteError
from enginery.graph_rewriting import (
    AnalysisPatternManager,
    FLayerInfo,
    FLayerInfoMemo,
    Layer,
    LayerKind,
    PatternAnalyzer,
    PatternRewriter,
    RewritePatternManager,
    Tensor,
    gpt_attention,
    net_guard,
    trt,
)
from enginery.graph_rewriting import Network as View
from enginery.network import Network
from rewriting.building import network_of, ops_of


class ReplaceAddWithSub(PatternRewriter):
    def __init__(self, **options):
        super().__init__("replace_add_with_sub", root_layer={trt.LayerType.ELEMENTWISE}, **options)

    def match(self, layer: Layer):
        return layer.as_layer().op == trt.ElementWiseOperation.SUM

    def rewrite(self, layer: Layer) -> None:
        with net_guard(layer.network):
            a, b = layer.get_inputs(0, 1)
            o = layer.get_outputs(0)[0]
            c = a - b
            o.replace_all_uses_with(c)
            layer.mark_as_removed()
            assert layer.is_removed()


@pytest.mark.parametrize("keyword", ["separate_match_rewrite", "seperate_match_rewrite"])
def test_first_example_of_the_guide(keyword):
    network = network_of(lambda x, y: torch.exp(x + y) + x)
    manager = RewritePatternManager()
    manager.add(label="replace_add_with_sub", pattern=ReplaceAddWithSub(**{keyword: True}), benefit=1)
    report = manager.rewrite(network)
    assert ops_of(network) == ["sub", "exp", "sub"]
    assert report["replace_add_with_sub"].rewritten == 2
    network.verify()


class RemovePadding(PatternRewriter):
    def __init__(self):
        super().__init__("gpt_attention_plugin_remove_padding", root_layer={trt.LayerType.PLUGIN_V2})

    def match_and_rewrite(self, layer: Layer) -> bool:
        plugin = layer.as_layer().plugin
        if plugin.plugin_namespace != "tensorrt_llm" or plugin.plugin_type != "GPTAttention":
            return False
        flayer = FLayerInfoMemo.instance().get(layer.name)
        assert flayer
        if flayer.get_input("qkv").shape[0] == 1:
            return False
        batch, length, hidden = (self.args[name] for name in ("batch_size", "in_len", "hidden_size"))
        with net_guard(layer.network):
            new_inputs = flayer.clone_inputs()
            new_inputs["qkv"] = Tensor(name="qkv", dtype=trt.float16, shape=(1, batch * length, hidden))
            new_outs = gpt_attention(**new_inputs)
            flayer.replace_outputs_uses_with(layer.network, new_outs)
            layer.mark_as_removed()
        return True


def padded_network():
    network = Network()
    qkv = network.add_input("padded", (2, 4, 24), torch.float16)
    network.set_output("out", network.call(torch.ops.enginery.gpt_attention.default, qkv, 2, 1, 6) * 2)
    return network


def test_second_example_of_the_guide():
    network = padded_network()
    manager = RewritePatternManager()
    manager.add("remove_padding", RemovePadding())
    report = manager.rewrite(View(network), args={"batch_size": 2, "in_len": 4, "hidden_size": 24})
    assert report["remove_padding"].rewritten == 1
    assert network.outputs[0].shape == (1, 8, 12)
    assert network.layers[0].inputs == [network.tensor("qkv")]
    network.verify()


def test_a_rule_that_raises_leaves_no_trace():
    class Raises(RemovePadding):
        def match_and_rewrite(self, layer):
            super().match_and_rewrite(layer)
            raise KeyError("late")

    network = padded_network()
    before = str(network)
    manager = RewritePatternManager()
    manager.add("raises", Raises())
    with pytest.raises(RewriteError, match="raises raised KeyError"):
        manager.rewrite(network, args={"batch_size": 2, "in_len": 4, "hidden_size": 24})
    assert str(network) == before


def test_the_network_as_rules_see_it():
    network = network_of(lambda x: F.silu(x) + x)
    net = View(network)
    silu, add = net.get_layers()
    assert net.get_layer_by_name("silu") == silu
    assert net.get_layer_by_name("nothing") is None
    assert [tensor.name for tensor in net.get_inputs()] == ["x"]
    (out,) = net.get_outputs()
    assert net.is_output(out)
    assert net.is_input(net.get_inputs()[0])
    assert out.get_parent() == add
    assert net.get_inputs()[0].get_users() == [silu, add]
    assert net.get_inputs()[0].get_parent() is None
    assert silu.type is LayerKind.ACTIVATION
    assert "silu" in net.to_dot()
    assert (out.shape[1], out.dtype, out.rank) == (8, torch.float32, 2)


def test_flayer_info_reads_the_call_on_each_access():
    network = network_of(lambda x, y, w: F.linear(x, w))
    with net_guard(network):
        info = FLayerInfoMemo.instance().get("linear")
        assert FLayerInfoMemo.instance().get("nothing") is None
        assert list(FLayerInfoMemo.instance().data) == ["linear"]
    assert (info.layer_kind, info.layer_name) == ("linear", "linear")
    assert list(info.raw_inputs) == ["input", "weight", "bias"]
    network.layers[0].replace_input(network.tensor("x"), network.tensor("y"))
    assert info.get_input("input").name == "y"
    info.raw_inputs["bias"] = "set for the next call"
    assert info.clone_inputs()["bias"] == "set for the next call"
    assert network.layers[0].arguments["bias"] is None


def test_outside_of_a_manager_edits_act_at_once():
    network = network_of(lambda x: torch.exp(F.silu(x)))
    silu = View(network).get_layer_by_name("silu")
    silu.get_outputs(0)[0].replace_all_uses_with(silu.get_inputs(0)[0])
    silu.mark_as_removed()
    assert silu.is_removed()
    assert ops_of(network) == ["exp"]


def test_replace_input_with_inside_a_rule():
    class Rewire(PatternRewriter):
        def match_and_rewrite(self, layer):
            x, y = View(network).get_inputs()
            if layer.get_inputs(0)[0] != x:
                return False
            FLayerInfo(layer.layer).replace_input_with(x, y)
            return True

    network = network_of(lambda x, y: F.silu(x))
    manager = RewritePatternManager()
    manager.add("rewire", Rewire("rewire"))
    manager.rewrite(network)
    assert network.layers[0].inputs == [network.tensor("y")]


def test_an_analyzer_cannot_change_the_network():
    class Naughty(PatternAnalyzer):
        def match(self, layer):
            return True

        def analyze(self, subgraph):
            subgraph[0].get_outputs(0)[0].replace_all_uses_with(subgraph[0].get_inputs(0)[0])

    manager = AnalysisPatternManager()
    manager.add("naughty", Naughty("naughty", {LayerKind.ACTIVATION}))
    network = network_of(lambda x: F.silu(x))
    before = str(network)
    with pytest.raises(Exception, match="not be changed"):
        manager.analyze(network)
    assert str(network) == before


def test_instances_are_per_context_not_global():
    mine = RewritePatternManager.instance()
    assert RewritePatternManager.instance() is mine
    found = []
    thread = threading.Thread(target=lambda: found.append(RewritePatternManager.instance()))
    thread.start()
    thread.join()
    assert found[0] is not mine
    assert AnalysisPatternManager.instance() is AnalysisPatternManager.instance()


def test_the_47_kinds_are_there():
    assert len(trt.LayerType) == 47


def test_both_examples_in_our_own_dialect():
    class AddToSub(rewriting.PatternRewriter):
        pattern = rewriting.Var("a") + rewriting.Var("b")

        def rewrite(self, a, b):
            return a - b

    class Pack(rewriting.PatternRewriter):
        pattern = ops.gpt_attention(rewriting.Var("qkv", where=lambda qkv: qkv.shape[0] != 1), ...)
        changes_shape = True

        def rewrite(self, network, root, qkv):
            batch, length, hidden = qkv.shape
            return root.replace(qkv=network.add_input("packed", (1, batch * length, hidden), qkv.dtype))

    network = network_of(lambda x, y: torch.exp(x + y) + x)
    rewriting.RewritePatternManager(AddToSub()).rewrite(network)
    assert ops_of(network) == ["sub", "exp", "sub"]
    network = padded_network()
    rewriting.RewritePatternManager(Pack()).rewrite(network)
    assert network.outputs[0].shape == (1, 8, 12)
    network.verify()
