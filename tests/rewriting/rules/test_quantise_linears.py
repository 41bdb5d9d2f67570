"""Linear layers in 8-bit floats: what they are rewritten to, how far from float64 they may be, and which stay."""

from __future__ import annotations

import pytest
import torch

from enginery import ops
from enginery.network import Layer, Network, Tensor
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.pipeline import PipelineConfig, run_phases
from enginery.rewriting.rules.quantise_linears import QuantiseLinears
from enginery.rewriting.structure import structure

ROUNDING = 2.0**-4
"""of a number with 3 bits of mantissa, relative"""
SUBNORMAL = 2.0**-10
"""half a step of float8_e4m3fn near zero"""
ROUNDED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
"""of the result, relative; float32 is summed in it too"""


def layer_text(dtype: str = "bfloat16") -> str:
    """y = linear(x [n, 64], w [48, 64], b) and a head behind it, z = linear(y, h [32, 48])."""
    return f"""network 1
input %x: {dtype}[n, 64]
constant %w: {dtype}[48, 64]
constant %b: {dtype}[48]
constant %h: {dtype}[32, 48]
%y: {dtype}[n, 48] = aten.linear(%x, %w, bias=%b)
%z: {dtype}[n, 32] = aten.linear(%y, %h)
output z = %z
"""


def body(dtype: str = "bfloat16") -> Network:
    return Network.parse(layer_text(dtype))


def quantised(network: Network, *, per_channel: bool = True) -> Network:
    report = RewritePatternManager(QuantiseLinears(per_channel=per_channel)).rewrite(network)
    network.verify()
    assert report["QuantiseLinears"].rewritten >= 1
    assert str(Network.parse(str(network))) == str(network)
    return network


def only_layer(network: Network) -> Network:
    """Without the head: the output is what the head would read."""
    (head,) = (layer for layer in network if layer.op is torch.ops.aten.linear.default)
    network.set_output("z", head.args[0])
    return network


GOLDEN = """network 1
input %x: bfloat16[n, 64]
constant %w: bfloat16[48, 64]
constant %b: bfloat16[48]
constant %h: bfloat16[32, 48]
%w_abs: bfloat16[48, 64] = aten.abs(%w)
%w_max: bfloat16[48, 1] = aten.amax(%w_abs, dim=[1], keepdim=True)
%w_wide_max: float32[48, 1] = aten.to.dtype(%w_max, float32)
%w_positive: float32[48, 1] = aten.clamp_min(%w_wide_max, 1e-12)
%w_scale: float32[48, 1] = aten.div.Tensor(%w_positive, 448.0)
%w_wide: float32[48, 64] = aten.to.dtype(%w, float32)
%w_scaled: float32[48, 64] = aten.div.Tensor(%w_wide, %w_scale)
%w_clamped: float32[48, 64] = aten.clamp(%w_scaled, min=-448.0, max=448.0)
%w_narrow: float8_e4m3fn[48, 64] = aten.to.dtype(%w_clamped, float8_e4m3fn)
%w_scales: float32[48] = aten.squeeze.dim(%w_scale, 1)
%y: bfloat16[n, 48] = enginery.linear(%x, %w_narrow, bias=%b, scale=%w_scales)
%z: bfloat16[n, 32] = aten.linear(%y, %h)
output z = %z
"""


def test_the_rewritten_layer() -> None:
    assert structure(quantised(body())) == structure(Network.parse(GOLDEN))


def inputs_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Activations `[5, 64]`: even, with outliers in a few features as language models have them, or tiny and zero."""
    x = torch.randn(5, 64)
    if kind == "outliers":
        x[:, [3, 17]] *= 300.0
    if kind == "small":
        x *= 10.0 ** torch.arange(-6, -1)[:, None]
        x[2] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["even", "outliers", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_output_is_within_the_rounding_of_its_terms(kind: str, dtype: torch.dtype, per_channel: bool) -> None:
    x, w, b = inputs_of(kind, dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    w[::3] *= 0.01
    network = only_layer(quantised(body(str(dtype).removeprefix("torch.")), per_channel=per_channel))
    (found,) = network.run([x], {"w": w, "b": b, "h": torch.zeros(32, 48, dtype=dtype)})
    wide, weight = x.double(), w.double()
    exact = wide @ weight.T
    largest = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax()
    allowed_w = torch.maximum(weight.abs() * ROUNDING, largest / 448 * SUBNORMAL) * 1.0001
    sums = wide.abs() @ allowed_w.T
    tiny = 1e-7 if dtype == torch.float16 else 1e-12  # subnormal results
    bound = sums + ROUNDED[dtype] * (wide.abs() @ weight.abs().T + sums + b.double().abs()) + tiny
    assert ((found.double() - exact - b.double()).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["even", "outliers"])
def test_errors_average_out(kind: str) -> None:
    """As a whole the result is as near as the rounding of one number on average, 2 to 3 %."""
    x, w, b = inputs_of(kind, torch.bfloat16), torch.randn(48, 64).bfloat16(), torch.zeros(48).bfloat16()
    network = only_layer(quantised(body()))
    (found,) = network.run([x], {"w": w, "b": b, "h": torch.zeros(32, 48).bfloat16()})
    exact = x.double() @ w.double().T
    assert (found.double() - exact).norm() / exact.norm() < 0.04


def test_large_numbers_of_float16_do_not_overflow() -> None:
    x, w = torch.full((2, 64), 300.0).half(), torch.full((48, 64), 2.0).half()
    network = only_layer(quantised(body("float16")))
    (found,) = network.run([x], {"w": w, "b": torch.zeros(48).half(), "h": torch.zeros(32, 48).half()})
    torch.testing.assert_close(found, torch.full((2, 48), 38400.0).half(), rtol=2**-7, atol=0)


def test_rows_of_zeros_give_the_bias() -> None:
    b = torch.randn(48).bfloat16()
    network = only_layer(quantised(body()))
    values = {"w": torch.zeros(48, 64).bfloat16(), "b": b, "h": torch.zeros(32, 48).bfloat16()}
    (found,) = network.run([torch.zeros(3, 64).bfloat16()], values)
    assert torch.equal(found, b.expand(3, -1))


def test_a_row_does_not_depend_on_the_others() -> None:
    x, w, b = inputs_of("outliers", torch.float32), torch.randn(48, 64), torch.randn(48)
    network = only_layer(quantised(body("float32")))
    values = {"w": w, "b": b, "h": torch.zeros(32, 48)}
    (together,) = network.run([x], values)
    for row in range(5):
        (alone,) = network.run([x[row : row + 1]], values)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5 * together.abs().max().item())


def test_one_scale_for_a_whole_weight() -> None:
    network = quantised(body(), per_channel=False)
    (layer,) = (layer for layer in network if layer.op is ops.linear)
    assert layer.arguments["scale"].shape == (1,)


STAYING = {
    "its product becomes the logits": layer_text().replace("output z = %z", "output z = %z\noutput y = %y"),
    "its weight is no constant matrix": layer_text().replace("constant %w", "input %w"),
    "a side of its weight is no multiple of 16": layer_text().replace("48", "40"),
    "its operands are torch.float64 and torch.float64": layer_text("float64"),
    "its product chooses experts": layer_text().replace(
        "%z: bfloat16[n, 32] = aten.linear(%y, %h)",
        "%p: bfloat16[n, 48] = aten.softmax.int(%y, -1)\n%t: (bfloat16[n, 48], int64[n, 48]) = aten.topk(%p, 48)\n"
        "%z: bfloat16[n, 32] = aten.linear(%t#0, %h)",
    ),
}


@pytest.mark.parametrize("reason", STAYING)
def test_linears_that_stay_are_counted_with_the_reason(reason: str) -> None:
    network = Network.parse(STAYING[reason])
    rule = RewritePatternManager(QuantiseLinears()).rewrite(network)["QuantiseLinears"]
    assert rule.rewritten == 0
    assert rule.declined[reason] >= 1
    assert narrow_linears(network) == 0


DECODER = """network 1
input %token_ids: int64[tokens]
input %positions: int64[tokens]
constant %embed: bfloat16[48, 32]
constant %wq: bfloat16[32, 32]
constant %wk: bfloat16[16, 32]
constant %wv: bfloat16[16, 32]
constant %up: bfloat16[64, 32]
constant %down: bfloat16[32, 64]
%x: bfloat16[tokens, 32] = aten.embedding(%embed, %token_ids)
%q: bfloat16[tokens, 32] = aten.linear(%x, %wq)
%k: bfloat16[tokens, 16] = aten.linear(%x, %wk)
%v: bfloat16[tokens, 16] = aten.linear(%x, %wv)
%q2: bfloat16[tokens, 2, 16] = aten.view(%q, [tokens, 2, 16])
%k2: bfloat16[tokens, 1, 16] = aten.view(%k, [tokens, 1, 16])
%v2: bfloat16[tokens, 1, 16] = aten.view(%v, [tokens, 1, 16])
%a: bfloat16[tokens, 2, 16] = enginery.attention(%q2, %k2, %v2, 0.25)
%a2: bfloat16[tokens, 32] = aten.view(%a, [tokens, 32])
%y: bfloat16[tokens, 32] = aten.add.Tensor(%x, %a2)
%u: bfloat16[tokens, 64] = aten.linear(%y, %up)
%s: bfloat16[tokens, 64] = aten.silu(%u)
%d: bfloat16[tokens, 32] = aten.linear(%s, %down)
%r: bfloat16[tokens, 32] = aten.add.Tensor(%y, %d)
%logits: bfloat16[tokens, 48] = aten.linear(%r, %embed)
output logits = %logits
"""


def narrow_linears(network: Network) -> int:
    return sum(isinstance(layer.arguments.get("scale"), Tensor) for layer in network)


def count(network: Network, name: str) -> int:
    return sum(layer.op._opname == name for layer in network)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_the_pipeline(device: str) -> None:
    """Query, key and value stay one product; the head goes the way of unquantised linears."""
    network = Network.parse(DECODER)
    report = run_phases(network, PipelineConfig(rules=(QuantiseLinears(),), device=device))
    network.verify()
    assert report["quantise"]["QuantiseLinears"].rewritten == 3
    names = [layer.op.name() for layer in network]
    linears = {"enginery::linear", "enginery::norm_linear", "enginery::packed_linear"}
    assert (narrow_linears(network), sum(name in linears for name in names)) == (3, 4)
    assert ("enginery::packed_linear" in names) == (device == "cpu")
    assert "aten::linear" not in names


class SiluToTanh(PatternRewriter):
    """silu(x) -> tanh(x): wrong on purpose, so that its effect shows"""

    root_layer = (torch.ops.aten.silu.default,)

    def match_and_rewrite(self, layer: Layer) -> object:
        return torch.tanh(layer.args[0])


def run_decoder(*rules: PatternRewriter, disabled_rules: tuple[str, ...] = ()) -> Network:
    network = Network.parse(DECODER)
    run_phases(network, PipelineConfig(rules=(*rules, QuantiseLinears()), disabled_rules=disabled_rules))
    return network


def test_beside_rules_of_the_users_own() -> None:
    network = run_decoder(SiluToTanh())
    assert (count(network, "tanh"), narrow_linears(network)) == (1, 3)


def test_switched_off_and_without_merged_linears() -> None:
    assert narrow_linears(run_decoder(disabled_rules=("QuantiseLinears",))) == 0
    network = run_decoder(disabled_rules=("MergeParallelLinears",))
    assert narrow_linears(network) == count(network, "amax") == 5
