"""Logits of the tokens that are asked for: how far up the choice goes, and that it changes no number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.engine.decoder import Decoder, imported
from tests.system.conftest import _quiet_torch  # noqa: F401  (a fixture)
from tests.system.paged import PagedDriver
from tests.system.test_architectures import prompts
from tests.system.tiny_models import make_checkpoint

from enginery.analysis import CostAnalyzer, Step
from enginery.checkpoint import Checkpoint
from enginery.engine.binding import split
from enginery.engine.regions import outline
from enginery.frontends.huggingface import import_checkpoint
from enginery.network import Dim, Layer, Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.pipeline import PipelineConfig, run_phases
from enginery.rewriting.rules.gather_logits import GatherEarlier, GatherInLastLayer, gather_output
from enginery.rewriting.testing import assert_rewrites

RULES = (GatherEarlier(), GatherInLastLayer())
CONSTANTS = (
    "constant %g: float32[6]\nconstant %w: float32[6, 6]\nconstant %u: float32[16, 6]\nconstant %v: float32[6, 8]\n"
)


def network(body: str) -> Network:
    return Network.parse(f"network 1\n{CONSTANTS}{body}\n")


def asked(body: str) -> Network:
    """The network, asked for the logits of chosen tokens only."""
    found = network(body)
    gather_output(found)
    return found


def test_the_gather_goes_before_the_head() -> None:
    before = asked(
        "input %x: float32[1, tokens, 6]\n"
        "%a: float32[1, tokens, 6] = aten.mul.Tensor(%g, %x)\n%h: float32[1, tokens, 16] = aten.linear(%a, %u)\n"
        "%c: float32[1, tokens, 16] = aten.tanh(%h)\n%d: float32[1, tokens, 16] = aten.mul.Tensor(%c, 30.0)\n"
        "%s: float32[tokens, 16] = aten.select.int(%d, 0, 0)\noutput logits = %s"
    )
    after = network(
        "input %x: float32[1, tokens, 6]\ninput %logits_indices: int64[logits]\n"
        "%i: float32[1, logits, 6] = aten.index_select(%x, 1, %logits_indices)\n"
        "%a: float32[1, logits, 6] = aten.mul.Tensor(%g, %i)\n%h: float32[1, logits, 16] = aten.linear(%a, %u)\n"
        "%c: float32[1, logits, 16] = aten.tanh(%h)\n%d: float32[1, logits, 16] = aten.mul.Tensor(%c, 30.0)\n"
        "%s: float32[logits, 16] = aten.select.int(%d, 0, 0)\noutput logits = %s"
    )
    assert_rewrites(before, after, GatherEarlier(), numerics_too=False)
    x, chosen = torch.randn(1, 5, 6), torch.tensor([4, 1])
    gain, head = torch.randn(6), torch.randn(16, 6)
    (found,) = before.run([x, chosen], {"g": gain, "u": head})
    torch.testing.assert_close(found, 30 * torch.tanh((x[0] * gain) @ head.T)[chosen])


LAYER = """input %x: float32[tokens, 6]
input %a: float32[tokens, 2, 3]
%m.layers.1.key: float32[tokens, 6] = aten.linear(%x, %w)
%m.layers.1.joined: float32[tokens, 6] = aten.reshape(%a, [tokens, 6])
%m.layers.1.o: float32[tokens, 6] = aten.linear(%m.layers.1.joined, %w)
%m.layers.1.s: float32[tokens, 6] = aten.add.Tensor(%x, %m.layers.1.o)
%m.layers.1.up: float32[tokens, 16] = aten.linear(%m.layers.1.s, %u)
%m.layers.1.parts: (float32[tokens, 8], float32[tokens, 8]) = aten.split_with_sizes(%m.layers.1.up, [8, 8], dim=-1)
%m.layers.1.gated: float32[tokens, 8] = aten.mul.Tensor(%m.layers.1.parts#0, %m.layers.1.parts#1)
%m.layers.1.down: float32[tokens, 6] = aten.linear(%m.layers.1.gated, %v)
%m.layers.1.y: float32[tokens, 6] = aten.add.Tensor(%m.layers.1.s, %m.layers.1.down)
%m.norm.mean: float32[tokens, 1] = aten.mean.dim(%m.layers.1.y, [-1], keepdim=True)
%m.norm.n: float32[tokens, 6] = aten.sub.Tensor(%m.layers.1.y, %m.norm.mean)
%m.head: float32[tokens, 16] = aten.linear(%m.norm.n, %u)
output logits = %m.head
"""
"""The end of a last layer, whose attention gives %a and needs a key of every token."""


def last_layer() -> Network:
    found = asked(LAYER)
    for layer in found:
        layer.module_path = layer.name.rpartition(".")[0]
    found.set_output("key", found.tensor("m.layers.1.key"))
    return found


def test_the_gather_stops_behind_the_repeated_layers() -> None:
    rewritten = last_layer()
    RewritePatternManager(GatherEarlier()).rewrite(rewritten)
    assert gathered(rewritten) == ["m.layers.1.y"]
    check_numbers(rewritten)


def test_the_gather_goes_through_a_layer_to_what_others_read() -> None:
    after = network(
        "input %x: float32[tokens, 6]\ninput %a: float32[tokens, 2, 3]\ninput %logits_indices: int64[logits]\n"
        "%key: float32[tokens, 6] = aten.linear(%x, %w)\n"
        "%b: float32[logits, 2, 3] = aten.index_select(%a, 0, %logits_indices)\n"
        "%joined: float32[logits, 6] = aten.reshape(%b, [logits, 6])\n"
        "%o: float32[logits, 6] = aten.linear(%joined, %w)\n"
        "%z: float32[logits, 6] = aten.index_select(%x, 0, %logits_indices)\n"
        "%s: float32[logits, 6] = aten.add.Tensor(%z, %o)\n%up: float32[logits, 16] = aten.linear(%s, %u)\n"
        "%parts: (float32[logits, 8], float32[logits, 8]) = aten.split_with_sizes(%up, [8, 8], dim=-1)\n"
        "%gated: float32[logits, 8] = aten.mul.Tensor(%parts#0, %parts#1)\n"
        "%down: float32[logits, 6] = aten.linear(%gated, %v)\n%y: float32[logits, 6] = aten.add.Tensor(%s, %down)\n"
        "%mean: float32[logits, 1] = aten.mean.dim(%y, [-1], keepdim=True)\n"
        "%n: float32[logits, 6] = aten.sub.Tensor(%y, %mean)\n%h: float32[logits, 16] = aten.linear(%n, %u)\n"
        "output logits = %h\noutput key = %key"
    )
    rewritten = last_layer()
    report = assert_rewrites(rewritten, after, RULES, numerics_too=False)
    assert (report["GatherInLastLayer"].rewritten, report["GatherEarlier"].rewritten) == (1, 0)
    assert {layer.module_path for layer in rewritten} == {"m", "m.layers.1", "m.norm", "logits"}
    check_numbers(rewritten)


def check_numbers(rewritten: Network) -> None:
    """On random inputs, with indices that repeat, are all tokens, or are few."""
    before = last_layer()
    constants = {tensor.name: torch.randn(*tensor.shape) for tensor in before.constants}
    x, a = torch.randn(5, 6), torch.randn(5, 2, 3)
    for indices in (torch.randint(0, 5, (9,)), torch.arange(5), torch.tensor([4])):
        found, expected = (each.run([x, a, indices], constants) for each in (rewritten, before))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


EXPERTS = """input %x: float32[tokens, 6]
input %chosen: int64[tokens, 2]
constant %experts: float32[4, 6, 6]
%e: float32[tokens, 1, 6] = aten.unsqueeze(%x, 1)
%t: float32[tokens, 2, 6] = aten.expand(%e, [-1, 2, -1])
%rows: float32[2*tokens, 6] = aten.reshape(%t, [2*tokens, 6])
%c: int64[2*tokens] = aten.reshape(%chosen, [-1])
%f: float32[2*tokens, 6] = enginery.expert_linear(%rows, %experts, %c)
%y: float32[tokens, 2, 6] = aten.reshape(%f, [tokens, 2, 6])
%s: float32[tokens, 6] = aten.sum.dim_IntList(%y, [1])
output logits = %s
"""


@pytest.mark.parametrize("shared", [False, True])
def test_rows_of_experts_are_gathered_by_token(shared: bool) -> None:
    """Two rows for each token, side by side; where the rows are read elsewhere too, they are gathered themselves."""
    rewritten = asked(EXPERTS)
    if shared:
        rewritten.set_output("rows", rewritten.tensor("rows"))
    RewritePatternManager(*RULES).rewrite(rewritten)
    (call,) = (layer for layer in rewritten if layer.op._opname == "expert_linear")
    assert str(call.output.shape) == "(2*logits, 6)"
    assert gathered(rewritten) == (["chosen", "reshape_1"] if shared else ["x", "chosen"])
    x, chosen, experts = torch.randn(5, 6), torch.randint(0, 4, (5, 2)), torch.randn(4, 6, 6)
    indices = torch.tensor([3, 3, 0])
    found = rewritten.run([x, chosen, indices], {"experts": experts})[0]
    expected = torch.einsum("tkoi,ti->to", experts[chosen[indices]], x[indices])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


STOPS = {
    "a sum over tokens": "%a: float32[tokens, 6] = aten.cumsum(%x, 0)\noutput logits = %a",
    "tokens in two orders": "%r: float32[2, tokens, 3] = aten.reshape(%x, [2, tokens, 3])\n"
    "%s: float32[2, tokens, 3] = aten.neg(%r)\n"
    "%a: float32[tokens, 6] = aten.reshape(%s, [tokens, 6])\noutput logits = %a",
    "a table of tokens": "%a: float32[tokens, 6] = aten.embedding(%x, %p)\noutput logits = %a",
    "the number of tokens": "%a: float32[tokens, 6] = aten.div.Scalar(%x, tokens)\noutput logits = %a",
    "every second token": "%r: float32[2*tokens, 3] = aten.reshape(%x, [2*tokens, 3])\n"
    "%a: float32[tokens, 3] = aten.slice.Tensor(%r, start=0, end=2*tokens, step=2)\noutput logits = %a",
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_the_gather_stops_where_tokens_meet(name: str) -> None:
    before = asked("input %x: float32[tokens, 6]\ninput %p: int64[tokens]\n" + STOPS[name])
    report = RewritePatternManager(*RULES).rewrite(before)
    assert report.rewritten == 0
    assert any("is read elsewhere too" in reason for reason in report["GatherEarlier"].declined)


def gathered(found: Network) -> list[str]:
    """What is gathered for the logits, by name."""
    return [layer.args[0].name for layer in found if layer.op is torch.ops.aten.index_select.default]


ARCHITECTURES = {
    "llama": 2, "gemma2": 2, "gpt2": 2, "mistral": 2, "falcon": 2,
    "gptj": 3,  # attention and MLP side by side read one norm
    "phi": 3,  # its first product is one with those of query, key and value
    "mixtral": 2, "gpt_oss": 2, "deepseek_v3": 2,
}  # fmt: skip
"""How many values are gathered."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_behind_the_last_attention_is_computed_for_other_tokens(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(name, tmp_path))
    plain, moved = (import_checkpoint(checkpoint, dtype=torch.float32).network for _ in range(2))
    run_phases(plain, PipelineConfig(disabled_rules=("GatherEarlier", "GatherInLastLayer"), device="cuda"))
    run_phases(moved, PipelineConfig(device="cuda"))
    assert all(tokens_of(layer) == "logits" for layer in behind_attention(moved))
    assert len(gathered(moved)) == ARCHITECTURES[name]
    first, second = prompts()
    drivers = [PagedDriver(each, checkpoint) for each in (moved, plain)]
    steps = (
        ({"first": first[:9]}, torch.tensor([8])),
        ({"first": first[9:], "second": second}, torch.randint(0, len(first) + len(second) - 9, (6,))),
        ({"first": [5], "second": [7]}, torch.tensor([0, 1, 1, 1])),
    )
    for batch, indices in steps:
        found, expected = (driver.logits(batch, indices) for driver in drivers)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def behind_attention(found: Network) -> Iterator[Layer]:
    """The layers with an axis of tokens, all or chosen, that follow from the last attention."""
    layers = list(found)
    last = max(i for i, layer in enumerate(layers) if layer.op._opname.endswith("paged_attention"))
    return (layer for layer in layers[last + 1 :] if tokens_of(layer))


def tokens_of(layer: Layer) -> str:
    symbols = {symbol for size in layer.outputs[0].shape if isinstance(size, Dim) for symbol in size.symbols}
    return "".join(sorted(symbols & {"tokens", "logits"}))


def test_only_the_last_layer_differs() -> None:
    keys = keys_of_regions()
    assert len(keys) == 7
    assert keys[:5] == keys_of_regions("GatherInLastLayer")[:5]
    assert keys[2] == keys[3] == keys[4] != keys[5]  # the first layer has no addition before its norm


def test_on_a_cpu_the_last_layer_is_as_the_others() -> None:
    keys = keys_of_regions(device="cpu")
    assert len(keys) == 7
    assert len(set(keys)) == 3


def keys_of_regions(*disabled: str, device: str = "cuda") -> list[str]:
    """Of a prologue, five layers and an epilogue."""
    found = imported(Decoder(5)).network
    run_phases(found, PipelineConfig(disabled_rules=disabled, device=device))
    return [region.key for region in outline(split(found).network).regions]


def test_products_of_the_last_layer_are_counted_for_the_chosen_tokens() -> None:
    products = [products_of_a_step(rules) for rules in ((), (GatherInLastLayer(),))]
    weights = 32 * 32 + 2 * 32 * 96  # output projection, up and down
    assert products[0] - products[1] == 2 * weights * (100 - 1)


def products_of_a_step(rules: tuple[PatternRewriter, ...]) -> int:
    """FLOPs of the linears that prefill 100 tokens of one sequence."""
    found = imported(Decoder(2)).network
    run_phases(found, PipelineConfig(rules=rules))
    costs = CostAnalyzer(found, Step(100)).run()
    return sum(each.cost.flops for each in costs if each.layer.op._opname == "packed_linear")
