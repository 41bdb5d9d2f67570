"""Linears that take in the norm before them and the gate behind them: golden text, numbers, and what stays apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.system.conftest import _quiet_torch  # noqa: F401  (a fixture)
from tests.system.paged import PagedDriver
from tests.system.test_architectures import prompts
from tests.system.tiny_models import LLAMA, make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from enginery.checkpoint import Checkpoint
from enginery.engine.binding import split
from enginery.engine.regions import outline
from enginery.frontends.huggingface import import_checkpoint
from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.pipeline import FUSED_LINEARS, PipelineConfig, run_phases
from enginery.rewriting.rules.fuse_norm_linear import FuseGate, FuseNormLinear
from enginery.rewriting.rules.quantise_linears import QuantiseLinears
from enginery.rewriting.testing import assert_rewrites

INPUTS = (
    "network 1\ninput %x: float32[2, n, 6]\ninput %r: float32[2, n, 6]\nconstant %w: float32[6]\n"
    "constant %v: float8_e4m3fn[8, 6]\nconstant %b: float32[8]\nconstant %t: float32[8]\n"
)
ADD_NORM = "%a: (float32[2, n, 6], float32[2, n, 6]) = enginery.add_rms_norm(%x, %r, %w, 1e-05)\n"
LINEAR = ADD_NORM + "%y: float32[2, n, 8] = enginery.linear(%a#0, %v, bias=%b, scale=%t)\n"
NORM_LINEAR = (
    "%f: (float32[2, n, {0}], float32[2, n, 6]) = enginery.norm_linear(%x, %r, %w, 1e-05, %v, bias=%b, scale=%t{1})\n"
)
FUSED = NORM_LINEAR.format(8, "")
SILU_MUL = "%g: float32[2, n, 4] = enginery.silu_mul(%f#0)\n"


def network(body: str) -> Network:
    return Network.parse(INPUTS + body)


def test_a_linear_takes_in_the_norm_before_it() -> None:
    after = network(FUSED + "output y = %f#0\noutput s = %f#1\n")
    assert_rewrites(network(LINEAR + "output y = %y\noutput s = %a#1\n"), after, FuseNormLinear())


def test_a_linear_takes_in_the_gate_behind_it() -> None:
    after = network(NORM_LINEAR.format(4, ", gated=True") + "output y = %f#0\noutput s = %f#1\n")
    assert_rewrites(network(FUSED + SILU_MUL + "output y = %g\noutput s = %f#1\n"), after, FuseGate())


STAYING = {
    "a norm that another call reads": (
        FuseNormLinear(), LINEAR + "%z: float32[2, n, 6] = aten.neg(%a#0)\noutput y = %y\noutput z = %z\n",
        "its input is read by others, too",
    ),
    "a norm that is an output": (
        FuseNormLinear(), LINEAR + "output y = %y\noutput z = %a#0\n", "its input is read by others, too",
    ),
    "the sum": (
        FuseNormLinear(), LINEAR.replace("(%a#0, %v", "(%a#1, %v") + "output y = %y\n",
        "its input is not the first output of add_rms_norm",
    ),
    "a linear of an input": (
        FuseNormLinear(), LINEAR.replace("(%a#0, %v", "(%x, %v") + "output y = %y\n",
        "its input is not the first output of add_rms_norm",
    ),
    "gate and up that another call reads": (
        FuseGate(), FUSED + SILU_MUL + "%z: float32[2, n, 8] = aten.neg(%f#0)\noutput y = %g\noutput z = %z\n",
        "its input is read by others, too",
    ),
    "a gate behind a gate": (
        FuseGate(),
        NORM_LINEAR.format(4, ", gated=True")
        + "%g: float32[2, n, 2] = enginery.silu_mul(%f#0)\noutput y = %g\n",
        "the linear is gated already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_apart_and_why(name: str) -> None:
    rule: PatternRewriter
    rule, body, reason = STAYING[name]
    report = RewritePatternManager(rule).rewrite(network(body))
    assert report.rewritten == 0
    assert report[type(rule).__name__].declined == {reason: 1}


BLOCK = """network 1
range tokens = 1..16777216
input %x: bfloat16[1, tokens, 32]
input %x_1: bfloat16[1, tokens, 32]
input %w: bfloat16[32]
input %w_1: bfloat16[64, 32]
input %x_2: bfloat16[1, tokens, 8]
input %x_3: bfloat16[1, tokens, 8]
input %key_cache: bfloat16[num_blocks, 2, 16, 8]
input %value_cache: bfloat16[num_blocks, 2, 16, 8]
input %slot_mapping: int64[tokens]
input %block_tables: int32[sequences, blocks]
input %query_start: int32[sequences_plus_1]
input %seq_lens: int32[sequences]
input %w_2: bfloat16[32, 32]
input %w_3: bfloat16[32]
input %w_4: bfloat16[128, 32]
input %w_5: bfloat16[32, 64]
%self_attn.q_proj.norm_linear: (bfloat16[1, tokens, 64], bfloat16[1, tokens, 32]) = \
enginery.norm_linear(%x, %x_1, %w, 1e-06, %w_1)
%self_attn.q_proj.split_with_sizes: (bfloat16[1, tokens, 32], bfloat16[1, tokens, 16], bfloat16[1, tokens, 16]) = \
aten.split_with_sizes(%self_attn.q_proj.norm_linear#0, [32, 16, 16], dim=-1)
%self_attn.reshape: bfloat16[1, tokens, 4, 8] = aten.reshape(%self_attn.q_proj.split_with_sizes#0, [1, tokens, 4, 8])
%self_attn.reshape_1: bfloat16[1, tokens, 2, 8] = aten.reshape(%self_attn.q_proj.split_with_sizes#1, [1, tokens, 2, 8])
%self_attn.reshape_2: bfloat16[1, tokens, 2, 8] = aten.reshape(%self_attn.q_proj.split_with_sizes#2, [1, tokens, 2, 8])
%self_attn.unsqueeze: bfloat16[1, tokens, 1, 8] = aten.unsqueeze(%x_2, 2)
%self_attn.unsqueeze_1: bfloat16[1, tokens, 1, 8] = aten.unsqueeze(%x_3, 2)
%self_attn.select: bfloat16[tokens, 2, 8] = aten.select.int(%self_attn.reshape_2, 0, 0)
%self_attn.select_1: bfloat16[tokens, 4, 8] = aten.select.int(%self_attn.reshape, 0, 0)
%self_attn.select_2: bfloat16[tokens, 2, 8] = aten.select.int(%self_attn.reshape_1, 0, 0)
%self_attn.reshape_3: bfloat16[tokens, 8] = aten.reshape(%self_attn.unsqueeze, [tokens, 8])
%self_attn.reshape_4: bfloat16[tokens, 8] = aten.reshape(%self_attn.unsqueeze_1, [tokens, 8])
%self_attn.rotary_paged_attention: bfloat16[tokens, 4, 8] = enginery.rotary_paged_attention(%self_attn.select_1, \
%self_attn.select_2, %self_attn.select, %self_attn.reshape_3, %self_attn.reshape_4, %key_cache, %value_cache, \
%slot_mapping, %block_tables, %query_start, %seq_lens, 0.3535533905932738)
%self_attn.reshape_5: bfloat16[1, tokens, 32] = aten.reshape(%self_attn.rotary_paged_attention, [1, tokens, 32])
%self_attn.o_proj.linear: bfloat16[1, tokens, 32] = enginery.linear(%self_attn.reshape_5, %w_2)
%mlp.norm_linear: (bfloat16[1, tokens, 64], bfloat16[1, tokens, 32]) = \
enginery.norm_linear(%self_attn.q_proj.norm_linear#1, %self_attn.o_proj.linear, %w_3, 1e-06, %w_4, gated=True)
%mlp.down_proj.linear: bfloat16[1, tokens, 32] = enginery.linear(%mlp.norm_linear#0, %w_5)
output result0 = %mlp.norm_linear#1
output result1 = %mlp.down_proj.linear
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Four layers, as imported."""
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 4})).save_pretrained(directory)
    return import_checkpoint(Checkpoint.open(directory), dtype=torch.bfloat16).network


@pytest.mark.parametrize("rules", [(), (QuantiseLinears(),)], ids=["bfloat16", "fp8"])
def test_between_the_first_and_the_last_layer_all_are_one_region(llama: Network, rules: tuple[QuantiseLinears]) -> None:
    """The first has no addition before it; the last goes on with the chosen tokens alone, through norm and head."""
    network = llama.copy()
    run_phases(network, PipelineConfig(device="cuda", rules=rules))
    regions = outline(split(network).network).regions
    assert [region.name for region in regions] == ["prologue", *(f"model.layers.{i}" for i in range(4)), "epilogue"]
    keys = [region.key for region in regions]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 5
    if not rules:
        assert str(regions[2].network) == BLOCK
    calls = Counter(layer.op._opname for region in regions[2:] for layer in region.network)
    assert (calls["norm_linear"], calls["linear"]) == (2 * 3 + 1, 2 * 3)
    assert calls["add_rms_norm"] == calls["silu_mul"] == calls["rsqrt"] == 0


EXPECTED = {
    "llama": (4, 2), "mistral": (4, 2), "qwen2": (4, 2), "qwen3": (4, 2), "phi3": (4, 2), "gemma2": (4, 0),
    "olmo2": (1, 0), "mixtral": (2, 0),
}  # fmt: skip
"""norm_linear, and gated ones, of two layers. The first norm has no sum before it. Gemma gates by GELU and norms twice,
OLMo norms behind its linears, all but the last one; experts and their router share a norm."""


def in_float64(network: Network) -> Network:
    """The same calls in float64, so that two ways to round cannot hide a mistake."""
    wide = Network.parse(str(network).replace("bfloat16", "float64").replace("float32", "float64"))
    wide.values.update({name: value.to(wide.tensor(name).dtype) for name, value in network.values.items()})
    return wide


def logits(checkpoint: Checkpoint, network: Network) -> torch.Tensor:
    """Of two prompts in two chunks each."""
    driver = PagedDriver(in_float64(network), checkpoint)
    first, second = prompts()
    steps = [{"first": first[:9], "second": second[:4]}, {"first": first[9:], "second": second[4:]}]
    return torch.cat([rows for step in steps for rows in driver.step(step).values()])


@pytest.mark.parametrize("rules", [(), (QuantiseLinears(),)], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_gpus_network_computes_what_it_did(name: str, rules: tuple[PatternRewriter, ...], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(name, tmp_path))
    network = import_checkpoint(checkpoint, dtype=torch.bfloat16).network
    plain = network.copy()
    run_phases(network, PipelineConfig(device="cuda", rules=rules))
    network.verify()
    without = tuple(rule.__name__ for rule in FUSED_LINEARS)
    run_phases(plain, PipelineConfig(device="cuda", rules=rules, disabled_rules=without))
    fused = [layer for layer in network if layer.op._opname == "norm_linear"]
    assert (len(fused), sum(layer.arguments["gated"] for layer in fused)) == EXPECTED[name]
    assert not {"norm_linear", "add_rms_norm", "silu_mul"} & {layer.op._opname for layer in plain}
    found, expected = logits(checkpoint, network), logits(checkpoint, plain)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_on_a_cpu_they_wait_to_be_asked(llama: Network) -> None:
    def fused(*rules: PatternRewriter) -> int:
        network = llama.copy()
        run_phases(network, PipelineConfig(rules=rules))
        return sum(layer.op._opname == "norm_linear" and "layers" in layer.module_path for layer in network)

    assert fused() == fused(QuantiseLinears()) == 0
    assert fused(*(rule() for rule in FUSED_LINEARS)) == 7
    assert fused(QuantiseLinears(), *(rule() for rule in FUSED_LINEARS)) == 7
