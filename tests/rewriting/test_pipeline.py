"""The phases on one page: switches, reports, dumps, the user's own rules, and the promise that tokens stay apart."""

from __future__ import annotations

import pytest
import torch

from enginery.errors import RewriteError, UnsupportedError, UsageError
from enginery.network import Layer, Network
from enginery.rewriting import PatternRewriter
from enginery.rewriting.pipeline import PHASES, PipelineConfig, rule_names, run_phases

DECODER = """network 1
input %token_ids: int64[tokens]
input %positions: int64[tokens]
constant %embed: float32[40, 8]
constant %wq: float32[8, 8]
constant %wk: float32[4, 8]
constant %wv: float32[4, 8]
constant %head: float32[40, 8]
%x: float32[tokens, 8] = aten.embedding(%embed, %token_ids)
%q: float32[tokens, 8] = aten.linear(%x, %wq)
%k: float32[tokens, 4] = aten.linear(%x, %wk)
%v: float32[tokens, 4] = aten.linear(%x, %wv)
%q2: float32[tokens, 2, 4] = aten.view(%q, [tokens, 2, 4])
%k2: float32[tokens, 1, 4] = aten.view(%k, [tokens, 1, 4])
%v2: float32[tokens, 1, 4] = aten.view(%v, [tokens, 1, 4])
%a: float32[tokens, 2, 4] = enginery.attention(%q2, %k2, %v2, 0.5)
%a2: float32[tokens, 8] = aten.view(%a, [tokens, 8])
%s: float32[tokens, 8] = aten.silu(%a2)
%y: float32[tokens, 8] = aten.add.Tensor(%x, %s)
%logits: float32[tokens, 40] = aten.linear(%y, %head)
output logits = %logits
"""


class SiluToTanh(PatternRewriter):
    """silu(x) -> tanh(x): wrong on purpose, so that its effect shows"""

    root_layer = (torch.ops.aten.silu.default,)

    def match_and_rewrite(self, layer: Layer) -> object:
        return torch.tanh(layer.args[0])


def ops_of(network: Network) -> list[str]:
    return [layer.op._opname for layer in network]


def test_what_comes_out() -> None:
    network = Network.parse(DECODER)
    report = run_phases(network)
    network.verify()
    assert [tensor.name for tensor in network.inputs] == [
        "token_ids", "positions", "slot_mapping", "block_tables", "query_start", "seq_lens", "key_cache.0",
        "value_cache.0", "logits_indices",
    ]  # fmt: skip
    (logits,) = network.outputs
    assert network.output_names == ("logits",)
    assert repr(logits.shape) == "(logits, 40)"
    assert logits.dtype == torch.float32
    counts = report.counts
    assert (counts["MergeParallelLinears"], counts["PageAttention"], counts["PackLinears"]) == (1, 1, 2)
    wanted = [phase.name for phase in PHASES if phase.wanted(PipelineConfig())]
    assert [name for name, _ in report.phases] == wanted
    assert report["paged attention"]["PageAttention"].rewritten == 1
    assert "PageAttention" in str(report)
    assert report.milliseconds > 0
    assert [entry["phase"] for entry in report.to_json()] == wanted


@pytest.mark.parametrize("name", ["MergeParallelLinears", "PackLinears", "ViewToReshape", "GatherEarlier"])
def test_every_rule_can_be_switched_off(name: str) -> None:
    network = Network.parse(DECODER)
    report = run_phases(network, PipelineConfig(disabled_rules=(name,)))
    assert name not in report.counts
    network.verify()


def test_all_rules_have_names_of_their_own() -> None:
    assert len(rule_names()) == len(set(rule_names()))
    assert {"DeadCode", "RecogniseAttention", "PageAttention"} <= set(rule_names())


def test_an_unknown_rule_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"no rule is named 'MergeLinears'\. Near: MergeParallelLinears") as caught:
        run_phases(Network.parse(DECODER), PipelineConfig(disabled_rules=("MergeLinears",)))
    assert "\n" not in str(caught.value)


def test_packing_is_for_the_cpu() -> None:
    for config in (PipelineConfig(device="cuda"), PipelineConfig(pack_linears=False)):
        network = Network.parse(DECODER)
        run_phases(network, config)
        assert "packed_linear" not in ops_of(network)


def test_rules_of_the_users_own() -> None:
    network = Network.parse(DECODER)
    report = run_phases(network, PipelineConfig(rules=(SiluToTanh(),)))
    assert report["user rules"]["SiluToTanh"].rewritten == 1
    assert "tanh" in ops_of(network)
    network = Network.parse(DECODER)
    run_phases(network, PipelineConfig(rules=(SiluToTanh(),), disabled_rules=("SiluToTanh",)))
    assert "silu" in ops_of(network)


def test_a_rule_that_raises_is_named() -> None:
    class Broken(SiluToTanh):
        def match_and_rewrite(self, layer: Layer) -> object:
            raise KeyError("oops")

    with pytest.raises(RewriteError, match="Broken") as caught:
        run_phases(Network.parse(DECODER), PipelineConfig(rules=(Broken(),)))
    assert caught.value.layer == "s"


MIXING = {
    "cumsum": ("%s: float32[tokens, 8] = aten.cumsum(%a2, 0)", "combines different tokens"),
    "softmax": ("%s: float32[tokens, 8] = aten.softmax.int(%a2, 0)", "combines different tokens"),
    "flip": ("%s: float32[tokens, 8] = aten.flip(%a2, [0])", "combines different tokens"),
    "roll": ("%s: float32[tokens, 8] = aten.roll(%a2, [1], dims=[0])", "combines different tokens"),
    "mean": (
        "%m: float32[8] = aten.mean.dim(%a2, [0])\n%s: float32[tokens, 8] = aten.mul.Tensor(%a2, %m)",
        "combines different tokens",
    ),
    "scores": (
        "%t: float32[8, tokens] = aten.transpose.int(%a2, 0, 1)\n%m: float32[tokens, tokens] = aten.matmul(%a2, %t)\n"
        "%s: float32[tokens, 8] = aten.matmul(%m, %a2)",
        "relates every token to every other",
    ),
    "convolution": (
        "%t: float32[8, tokens] = aten.transpose.int(%a2, 0, 1)\n"
        "%m: float32[8, tokens] = aten.conv1d(%t, %kernel, padding=[1])\n"
        "%s: float32[tokens, 8] = aten.transpose.int(%m, 0, 1)",
        "is not known to keep tokens apart",
    ),
    "count": (
        "%m: int64[tokens] = aten.arange(tokens)\n%u: int64[tokens, 1] = aten.unsqueeze(%m, 1)\n"
        "%s: float32[tokens, 8] = aten.mul.Tensor(%a2, %u)",
        "counts the tokens of a step",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_networks_that_mix_tokens_are_refused(name: str) -> None:
    lines, message = MIXING[name]
    source = DECODER.replace("%s: float32[tokens, 8] = aten.silu(%a2)", lines)
    source = source.replace("constant %embed", "constant %kernel: float32[8, 8, 3]\nconstant %embed")
    with pytest.raises(UnsupportedError, match=message) as caught:
        run_phases(Network.parse(source))
    assert "\n" not in str(caught.value)


def test_attention_that_was_not_paged_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"enginery\.attention\) combines"):
        run_phases(Network.parse(DECODER), PipelineConfig(disabled_rules=("PageAttention",)))
