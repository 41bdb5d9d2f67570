"""Rules that join what lies between products into one operator: golden text, numbers, and what they leave alone."""

from __future__ import annotations

import pytest
import torch

from enginery import ops
from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.rules.fuse_add_norm import FuseAddNorm
from enginery.rewriting.rules.fuse_rotary import FuseRotary
from enginery.rewriting.rules.fuse_silu_mul import FuseSiluMul
from enginery.rewriting.rules.page_attention import open_cache
from enginery.rewriting.testing import assert_rewrites

SUM = "input %x: {0}[n, 6]\ninput %h: {0}[n, 6]\nconstant %w: {0}[6]\n"
NORM = (
    "%p: float32[n, 6] = aten.pow.Tensor_Scalar(%{0}, 2)\n%m: float32[n, 1] = aten.mean.dim(%p, [-1], keepdim=True)\n"
    "%e: float32[n, 1] = aten.add.Tensor(%m, 1e-05)\n%i: float32[n, 1] = aten.rsqrt(%e)\n"
    "%d: float32[n, 6] = aten.mul.Tensor(%{0}, %i)\n"
)
PLAIN = SUM.format("float32") + "%s: float32[n, 6] = aten.add.Tensor(%x, %h)\n" + NORM.format("s")
FUSED = "%f: ({0}[n, 6], {0}[n, 6]) = enginery.add_rms_norm(%x, %h, %{1}, 1e-05)\noutput r = %f#0\noutput s = %f#1\n"


def text(body: str) -> str:
    return f"network 1\n{body}\n"


def network(body: str) -> Network:
    return Network.parse(text(body))


def test_add_and_norm() -> None:
    before = f"{PLAIN}%r: float32[n, 6] = aten.mul.Tensor(%w, %d)\noutput r = %r\noutput s = %s"
    assert_rewrites(network(before), text(SUM.format("float32") + FUSED.format("float32", "w")), FuseAddNorm())


def test_add_and_norm_of_llama_in_bfloat16() -> None:
    before = (
        SUM.format("bfloat16") + "%s: bfloat16[n, 6] = aten.add.Tensor(%x, %h)\n"
        "%t: float32[n, 6] = aten.to.dtype(%s, float32)\n" + NORM.format("t")
        + "%b: bfloat16[n, 6] = aten.to.dtype(%d, bfloat16)\n"
        "%r: bfloat16[n, 6] = aten.mul.Tensor(%w, %b)\noutput r = %r\noutput s = %s"
    )  # fmt: skip
    assert_rewrites(network(before), text(SUM.format("bfloat16") + FUSED.format("bfloat16", "w")), FuseAddNorm())


def test_add_and_norm_of_gemma_in_bfloat16() -> None:
    before = (
        SUM.format("bfloat16") + "%s: bfloat16[n, 6] = aten.add.Tensor(%x, %h)\n"
        "%t: float32[n, 6] = aten.to.dtype(%s, float32)\n" + NORM.format("t")
        + "%v: float32[6] = aten.to.dtype(%w, float32)\n%g: float32[6] = aten.add.Tensor(%v, 1.0)\n"
        "%k: float32[n, 6] = aten.mul.Tensor(%d, %g)\n%r: bfloat16[n, 6] = aten.to.dtype(%k, bfloat16)\n"
        "output r = %r\noutput s = %s"
    )  # fmt: skip
    after = (
        SUM.format("bfloat16")
        + "%v: float32[6] = aten.to.dtype(%w, float32)\n%g: float32[6] = aten.add.Tensor(%v, 1.0)\n"
        + FUSED.format("bfloat16", "g")
    )
    assert_rewrites(network(before), text(after), FuseAddNorm())


GATE_UP = "input %x: float32[n, 8]\n"
PARTS = {
    "split": "%c: (float32[n, 4], float32[n, 4]) = aten.split_with_sizes(%x, [4, 4], dim=-1)\n",
    "chunk": "%c: (float32[n, 4], float32[n, 4]) = aten.chunk(%x, 2, dim=1)\n",
}


@pytest.mark.parametrize("name", PARTS)
def test_silu_and_mul(name: str) -> None:
    before = f"{GATE_UP}{PARTS[name]}%s: float32[n, 4] = aten.silu(%c#0)\n%r: float32[n, 4] = aten.mul.Tensor(%c#1, %s)"
    after = f"{GATE_UP}%r: float32[n, 4] = enginery.silu_mul(%x)\noutput r = %r"
    assert_rewrites(network(f"{before}\noutput r = %r"), text(after), FuseSiluMul())


HEADS = "input %q: float32[1, tokens, 4, 8]\ninput %k: float32[1, tokens, 2, 8]\ninput %v: float32[tokens, 2, 8]\n"
TABLES = "input %cos: float32[1, tokens, 8]\ninput %sin: float32[1, tokens, 8]\n"


def rotation(name: str, heads: int, cos: str = "c", start: int = 4) -> str:
    full, half = f"float32[1, tokens, {heads}, 8]", f"float32[1, tokens, {heads}, 4]"
    return (
        f"%{name}1: {full} = aten.mul.Tensor(%{name}, %{cos})\n"
        f"%{name}2: {half} = aten.slice.Tensor(%{name}, dim=3, start={start - 4}, end={start})\n"
        f"%{name}3: {half} = aten.slice.Tensor(%{name}, dim=3, start={8 - start}, end={12 - start})\n"
        f"%{name}4: {half} = aten.neg(%{name}3)\n%{name}5: {full} = aten.cat([%{name}4, %{name}2], dim=-1)\n"
        f"%{name}6: {full} = aten.mul.Tensor(%{name}5, %s)\n%{name}7: {full} = aten.add.Tensor(%{name}1, %{name}6)\n"
        f"%{name}8: float32[tokens, {heads}, 8] = aten.select.int(%{name}7, 0, 0)\n"
    )


def rotated(**options: int | str) -> Network:
    """Attention of rotated queries and keys over an open cache."""
    found = network(
        f"{HEADS}{TABLES}%c: float32[1, tokens, 1, 8] = aten.unsqueeze(%cos, 2)\n"
        "%s: float32[1, tokens, 1, 8] = aten.unsqueeze(%sin, 2)\n"
        + rotation("q", 4)
        + rotation("k", 2, **options)  # type: ignore[arg-type]
        + "%a: float32[tokens, 4, 8] = enginery.attention(%q8, %k8, %v, 0.5)\noutput r = %a"
    )
    open_cache(found, 16)
    attention = found.layer("a")
    query, key, value, scale, *_ = attention.args
    extra = [found.tensor(name) for name in ("key_cache.0", "value_cache.0", "slot_mapping", "block_tables")]
    extra += [found.tensor(name) for name in ("query_start", "seq_lens")]
    with found.inserting_before(None):
        found.set_output("r", found.call(ops.paged_attention, query, key, value, *extra, scale))
    found.erase(attention)
    return found


def batch() -> list[torch.Tensor]:
    """Two sequences, of 3 and 2 new tokens, one of them behind four cached ones; the inputs of `rotated` in order."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    slots = torch.tensor([16, 17, 18, 36, 37])
    tables, start, lengths = ([[1], [2]], [0, 3, 5], [3, 6])
    return [
        randn(1, 5, 4, 8), randn(1, 5, 2, 8), randn(5, 2, 8), randn(1, 5, 8), randn(1, 5, 8), slots,
        *(torch.tensor(data, dtype=torch.int32) for data in (tables, start, lengths)), randn(3, 2, 16, 8),
        randn(3, 2, 16, 8),
    ]  # fmt: skip


def test_rotary_embedding_and_attention() -> None:
    before = rotated()
    after = before.copy()
    assert RewritePatternManager(FuseRotary()).rewrite(after)["FuseRotary"].rewritten == 1
    (layer,) = (layer for layer in after if layer.op is ops.rotary_paged_attention)
    assert [tensor.parent.op._opname for tensor in layer.inputs[:5] if tensor.parent] == ["select"] * 2 + [
        "reshape"
    ] * 2
    assert [layer.op._opname for layer in after].count("slice") == 0
    values = batch()
    first, second = ([value.clone() for value in values] for _ in range(2))
    torch.testing.assert_close(after(*second), before(*first))
    for pool, expected in zip(second[-2:], first[-2:], strict=True):
        torch.testing.assert_close(pool, expected)
    assert not torch.equal(second[-1], values[-1])


UNROTATED = {
    "keys turned the other way": (rotated(start=8), "not turned by halves"),
    "keys of other angles": (rotated(cos="s"), "different angles"),
}


@pytest.mark.parametrize("name", UNROTATED)
def test_rotations_of_another_kind_stay(name: str) -> None:
    before, reason = UNROTATED[name]
    report = RewritePatternManager(FuseRotary()).rewrite(before)["FuseRotary"]
    assert report.rewritten == 0
    assert any(reason in declined for declined in report.declined), report.declined


LEFT_ALONE = {
    "a sum that broadcasts": (FuseAddNorm(), PLAIN.replace("%h: float32[n, 6]", "%h: float32[6]")),
    "the weight of each token": (
        FuseAddNorm(), PLAIN.replace("constant %w: float32[6]", "input %w: float32[6]"),
    ),
    "up before gate": (
        FuseSiluMul(),
        f"{GATE_UP}constant %w: float32[4]\n{PARTS['split']}%d: float32[n, 4] = aten.silu(%c#1)\n"
        "%y: float32[n, 4] = aten.mul.Tensor(%c#0, %d)\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name: str) -> None:
    rule: PatternRewriter
    rule, body = LEFT_ALONE[name]
    tail = "%r: float32[n, 6] = aten.mul.Tensor(%w, %d)\noutput r = %r" if "%i" in body else "output r = %y"
    assert RewritePatternManager(rule).rewrite(network(body + tail)).rewritten == 0
