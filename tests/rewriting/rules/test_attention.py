"""Attention spelled out in many ways is recognised for what it computes, and never for what it does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from enginery import ops
from enginery.network import Layer, Network
from enginery.rewriting import RewritePatternManager
from enginery.rewriting.pipeline import TIDY
from enginery.rewriting.rules.expand_baddbmm import ExpandBaddbmm
from enginery.rewriting.rules.group_repeated_heads import GroupRepeatedHeads
from enginery.rewriting.rules.page_attention import PageAttention, open_cache
from enginery.rewriting.rules.recognise_attention import RecogniseAttention
from enginery.rewriting.testing import assert_rewrites

HEADS, SIZE, LENGTH = 6, 8, 23
LEAST = torch.finfo(torch.float32).min

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal(query: torch.Tensor) -> torch.Tensor:
    place = torch.arange(query.shape[-2])
    return place[None, :] <= place[:, None]


def slopes() -> torch.Tensor:
    return torch.pow(2.0, -torch.arange(1, HEADS + 1) * 8.0 / HEADS)


def added_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3
    return torch.softmax(scores + torch.where(causal(q), 0.0, LEAST), dim=-1) @ v


def mask_before_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) + torch.where(causal(q), 0.0, LEAST)
    return torch.softmax((scores / math.sqrt(SIZE)).float(), dim=-1).to(v.dtype) @ v


def filled_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(q), -torch.inf)
    return F.dropout(torch.softmax(scores, dim=-1), 0.1, training=False) @ v


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    seen = causal(q) & (place[None, :] > place[:, None] - 20)
    return torch.softmax(torch.where(seen, q @ k.transpose(-1, -2) * 0.5, -1e9), dim=-1) @ v


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = slopes()[:, None, None] * torch.arange(q.shape[-2])
    scores = q @ k.transpose(-1, -2) * 0.3 + bias.to(q.dtype)
    return torch.softmax(scores + torch.where(causal(q), 0.0, LEAST), dim=-1).to(v.dtype) @ v


def alibi_in_baddbmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = (slopes()[:, None] * torch.arange(q.shape[-2]))[:, None]
    scores = torch.baddbmm(bias, q[0], k[0].transpose(1, 2), beta=1.0, alpha=0.3)
    return torch.bmm(torch.softmax(scores + torch.where(causal(q), 0.0, LEAST), dim=-1), v[0])[None]


def fused_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


def fused_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q)[None, None])


def fused_alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = (slopes()[:, None, None] * torch.arange(q.shape[-2]))[None].masked_fill(~causal(q), LEAST)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ATTENTIONS = (
    added_mask, mask_before_scale, filled_mask, windowed, alibi, alibi_in_baddbmm, fused_causal, fused_mask,
    fused_alibi,
)  # fmt: skip
SCALES = {
    added_mask: 0.3, mask_before_scale: SIZE**-0.5, filled_mask: 1.0, windowed: 0.5, alibi: 0.3, alibi_in_baddbmm: 0.3,
    fused_causal: 0.2, fused_mask: SIZE**-0.5, fused_alibi: SIZE**-0.5,
}  # fmt: skip


class Around(torch.nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v)


def network_of(attention: Attention, dtype: torch.dtype = torch.float32) -> Network:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    examples = tuple(torch.randn(1, HEADS, 7, SIZE, dtype=dtype) for _ in range(3))
    return Network.from_module(
        Around(attention), examples, dynamic_shapes={"q": {2: tokens}, "k": {2: tokens}, "v": {2: tokens}}
    )


def recognise(network: Network) -> list[Layer]:
    RewritePatternManager(*(rule() for rule in TIDY), ExpandBaddbmm(), RecogniseAttention()).rewrite(network)
    return [layer for layer in network if layer.op is ops.attention]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda function: function.__name__)
def test_recognised_and_equal(attention: Attention) -> None:
    network = network_of(attention)
    (layer,) = recognise(network)
    arguments = layer.arguments
    assert arguments["scale"] == pytest.approx(SCALES[attention])
    assert arguments["window"] == (20 if attention is windowed else None)
    assert (arguments["alibi_slopes"] is not None) == ("alibi" in attention.__name__)
    assert not any(other.op._opname in ("softmax", "bmm", "matmul", "arange") for other in network)
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(1, HEADS, LENGTH + 30, SIZE, generator=generator) for _ in range(3)]
    torch.testing.assert_close(network(*values), attention(*values), atol=2e-6, rtol=2e-5)


def test_slopes_survive_bfloat16() -> None:
    (layer,) = recognise(network_of(alibi, torch.bfloat16))
    found = layer.network.values[layer.arguments["alibi_slopes"].name]
    torch.testing.assert_close(found, slopes(), atol=0, rtol=1e-2)


def bidirectional(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def anticausal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(causal(q), -torch.inf), dim=-1) @ v


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5)
    return torch.softmax(scores.masked_fill(~causal(q), -torch.inf), dim=-1) @ v


def quadratic_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    scores = q @ k.transpose(-1, -2) - 0.01 * (place[:, None] - place[None, :]) ** 2
    return torch.softmax(scores.masked_fill(~causal(q), -torch.inf), dim=-1) @ v


def mask_from_data(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(q), -torch.inf)
    return torch.softmax(scores + q.sum(-1, keepdim=True) * torch.arange(q.shape[-2]), dim=-1) @ v


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    same = (place[None, :] // 5) == (place[:, None] // 5)
    return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~(causal(q) & same), -torch.inf), dim=-1) @ v


OTHERS = {
    bidirectional: "neither causal", anticausal: "neither causal", chunked: "neither causal",
    capped: "no scaled product",
    quadratic_bias: "not linear", mask_from_data: "depends on q",
}  # fmt: skip


@pytest.mark.parametrize("attention", OTHERS, ids=lambda function: function.__name__)
def test_what_is_something_else_is_left_alone(attention: Attention) -> None:
    network = network_of(attention)
    report = RewritePatternManager(ExpandBaddbmm(), RecogniseAttention()).rewrite(network)
    rule = report["RecogniseAttention"]
    assert rule.rewritten == 0
    assert any(OTHERS[attention] in reason for reason in rule.declined), rule.declined


def repeated(repeat: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        angle = torch.cat([k.sum(dim=(0, 1, 3))[None, None, :, None]] * SIZE, dim=-1) * 0 + 0.7
        k = repeat(k)
        k = k * angle.cos() + torch.cat([-k[..., SIZE // 2 :], k[..., : SIZE // 2]], dim=-1) * angle.sin()
        rows = (x[0].transpose(0, 1) for x in (q, k, repeat(v)))
        return ops.attention(*rows, 0.3)

    return attention


REPEATS = {
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "expand": lambda x: x[:, :, None].expand(1, 2, 3, x.shape[2], SIZE).reshape(1, 6, x.shape[2], SIZE),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_grouped(name: str) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    sizes = {"q": HEADS, "k": 2, "v": 2}
    examples = tuple(torch.randn(1, heads, 7, SIZE) for heads in sizes.values())
    function = repeated(REPEATS[name])
    network = Network.from_module(Around(function), examples, dynamic_shapes={key: {2: tokens} for key in sizes})
    report = RewritePatternManager(*(rule() for rule in TIDY), GroupRepeatedHeads()).rewrite(network)
    assert report["GroupRepeatedHeads"].rewritten == 1
    (layer,) = (layer for layer in network if layer.op is ops.attention)
    assert layer.arguments["key"].shape[1] == layer.arguments["value"].shape[1] == 2
    values = [torch.randn(1, heads, LENGTH, SIZE) for heads in sizes.values()]
    torch.testing.assert_close(network(*values), function(*values))


def test_heads_that_differ_are_not_grouped() -> None:
    network = Network.parse(
        "network 1\ninput %q: float32[n, 4, 8]\ninput %k: float32[n, 2, 8]\ninput %v: float32[n, 2, 8]\n"
        "%a: float32[n, 4, 8] = aten.repeat(%k, [1, 2, 1])\n%b: float32[n, 4, 8] = aten.repeat(%v, [1, 2, 1])\n"
        "%r: float32[n, 4, 8] = enginery.attention(%q, %a, %b, 0.5)\noutput r = %r\n"
    )
    assert RewritePatternManager(GroupRepeatedHeads()).rewrite(network).rewritten == 0  # h0 h1 h0 h1, not h0 h0 h1 h1


def test_paging() -> None:
    head = "input %q: float32[tokens, 4, 8]\ninput %k: float32[tokens, 2, 8]\ninput %v: float32[tokens, 2, 6]\n"
    network = Network.parse(
        f"network 1\n{head}%r: float32[tokens, 4, 6] = enginery.attention(%q, %k, %v, 0.5, window=9)\noutput r = %r\n"
    )
    open_cache(network, 16)
    after = (
        f"network 1\n{head}input %slot_mapping: int64[tokens]\ninput %block_tables: int32[sequences, blocks]\n"
        "input %query_start: int32[sequences_plus_1]\ninput %seq_lens: int32[sequences]\n"
        "input %key_cache.0: float32[num_blocks, 2, 16, 8]\ninput %value_cache.0: float32[num_blocks, 2, 16, 6]\n"
        "%r: float32[tokens, 4, 6] = enginery.paged_attention(%q, %k, %v, %key_cache.0, %value_cache.0, %slot_mapping, "
        "%block_tables, %query_start, %seq_lens, 0.5, window=9)\noutput r = %r\n"
    )
    assert_rewrites(network, after, PageAttention(), numerics_too=False)


def test_paging_declines_what_is_not_causal() -> None:
    network = Network.parse(
        "network 1\ninput %q: float32[tokens, 4, 8]\n"
        "%r: float32[tokens, 4, 8] = enginery.attention(%q, %q, %q, 0.5, causal=False)\noutput r = %r\n"
    )
    open_cache(network, 16)
    report = RewritePatternManager(PageAttention()).rewrite(network)
    assert report["PageAttention"].declined == {"it is not causal": 1}
