"""FLOPs against `torch.utils.flop_counter` on random modules, and attention against pairs counted one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from enginery import ops
from enginery.analysis import Step
from enginery.analysis.flops import flops, has_rule, is_product
from enginery.analysis.layer_cost import CostAnalyzer
from enginery.analysis.layout import Layout
from enginery.analysis.step import visible_keys, visible_pairs
from enginery.network import Network, Tensor, find_operator


class Block(nn.Module):
    """A transformer layer with the products that real ones have: linear, addmm, bmm, matmul, einsum, a convolution."""

    def __init__(self, heads: int, size: int, inner: int, kernel: int) -> None:
        super().__init__()
        width = heads * size
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width, bias=False)
        self.mix = nn.Conv1d(width, width, kernel, groups=heads)
        self.up = nn.Parameter(torch.randn(width, inner))
        self.bias = nn.Parameter(torch.randn(inner))
        self.down = nn.Parameter(torch.randn(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.softmax(q @ k.transpose(-1, -2) + torch.einsum("bhtd,bhsd->bhts", k, q), dim=-1)
        x = x + self.output((scores @ v).transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.mix(F.pad(x.transpose(1, 2), (self.mix.kernel_size[0] - 1, 0))).transpose(1, 2)
        flat = torch.addmm(self.bias, x.reshape(-1, width), self.up)
        return x + torch.bmm(F.gelu(flat).view(batch, tokens, -1), self.down.expand(batch, -1, -1))


def counted(function: Callable, args: Sequence[torch.Tensor]) -> tuple[int, int]:
    """FLOPs of products by our rules and by torch's counter."""
    module = function if isinstance(function, nn.Module) else _Function(function)
    network = Network.from_module(module, tuple(args))
    layout = Layout({})
    ours = sum(flops(layer, layout, Step()) or 0 for layer in network if is_product(layer.op))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args)
    return ours, counter.get_total_flops()


class _Function(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


@pytest.mark.parametrize("seed", range(4))
def test_a_transformer_layer_counts_as_torch_counts(seed: int) -> None:
    generator = random.Random(seed)
    heads, size, inner, kernel, batch, tokens = (generator.randint(2, limit) for limit in (4, 9, 9, 4, 3, 9))
    ours, theirs = counted(Block(heads, size, inner, kernel), [torch.randn(batch, tokens, heads * size)])
    assert ours == theirs > 0


CALLS = (
    (torch.mm, [(3, 5), (5, 7)]),
    (torch.matmul, [(2, 1, 3, 5), (4, 5, 6)]),
    (lambda x, y, z: torch.baddbmm(x, y, z), [(2, 3, 7), (2, 3, 5), (2, 5, 7)]),
    (F.conv2d, [(2, 4, 9, 8), (6, 4, 3, 3)]),
    (lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2), [(2, 4, 9, 8), (6, 2, 3, 3)]),
    (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(2, 4, 5, 6), (4, 3, 3, 3)]),
    (lambda x, w: F.conv3d(x, w), [(1, 2, 5, 5, 5), (3, 2, 3, 3, 3)]),
    (F.scaled_dot_product_attention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)]),
    (lambda x, y: torch.einsum("ij,jk->ik", x, y), [(3, 5), (5, 7)]),
    (lambda x, y: torch.einsum("...td,...sd->...ts", x, y), [(2, 4, 3, 5), (2, 4, 6, 5)]),
    (lambda x, y: torch.einsum("bij,kj", x, y), [(2, 3, 5), (7, 5)]),
    (lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z), [(3, 5), (5, 7), (7, 2)]),
)


@pytest.mark.parametrize(("function", "shapes"), CALLS)
def test_a_product_counts_as_torch_counts(function: Callable, shapes: Sequence[tuple[int, ...]]) -> None:
    ours, theirs = counted(function, [torch.randn(shape) for shape in shapes])
    assert ours == theirs > 0


@given(st.integers(1, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 16)))
def test_visible_pairs_and_keys_are_those_of_the_mask(queries: int, context: int, window: int | None) -> None:
    places = torch.arange(context, context + queries)[:, None] - torch.arange(context + queries)
    mask = places >= 0 if window is None else (places >= 0) & (places < window)
    assert visible_pairs(queries, context, window) == int(mask.sum())
    assert visible_keys(queries, context, window) == int(mask.any(dim=0).sum())


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 8)), st.booleans())
def test_attention_counts_the_pairs_that_the_reference_sees(
    tokens: int, kv_heads: int, group: int, window: int | None, causal: bool
) -> None:
    network = Network()
    heads = kv_heads * group
    q = network.add_input("q", (tokens, heads, 4), torch.float32)
    k = network.add_input("k", (tokens, kv_heads, 4), torch.float32)
    v = network.add_input("v", (tokens, kv_heads, 6), torch.float32)
    layer = network.call(ops.attention, q, k, v, 1.0, causal, window).parent
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window is not None:
        seen &= distance > -window
    assert flops(layer, Layout({}), Step()) == 2 * heads * int(seen.sum()) * (4 + 6)


REWRITTEN = """
    add.Tensor bitwise_not cat chunk clamp copy cos div.Tensor embedding expand gather gelu index.Tensor index_select
    layer_norm masked_fill.Scalar mean.dim mul.Tensor neg new_empty pow.Tensor_Scalar relu repeat
    repeat_interleave.self_int reshape rsqrt scatter.value select.int sigmoid silu sin slice.Tensor slice_scatter
    softmax.int split.Tensor split_with_sizes stack sub.Tensor sum.dim_IntList tanh to.dtype topk transpose.int
    unsqueeze zeros_like
"""
"""of aten: what the rewritten networks of the architectures in tests/system call"""


@pytest.mark.parametrize(
    "name", [*(f"aten.{name}" for name in REWRITTEN.split()), *(f"enginery.{op.name}" for op in ops.OPS)]
)
def test_the_operators_of_rewritten_networks_have_rules(name: str) -> None:
    assert has_rule(find_operator(name)), "give it a rule in analysis/flops.py"


@pytest.mark.parametrize("gated", [True, False])
def test_a_joined_linear_counts_as_its_parts(gated: bool) -> None:
    network = Network()
    x = network.add_input("x", (3, 7, 16), torch.bfloat16)
    norm = network.add_constant("norm", (16,), torch.bfloat16)
    weight = network.add_constant("weight", (10, 16), torch.float8_e4m3fn)
    scale = network.add_constant("scale", (10,), torch.float32)
    joined, _ = ops.norm_linear(x, x, norm, 1e-5, weight, None, scale, gated)
    normed, _ = ops.add_rms_norm(x, x, norm, 1e-5)
    product = ops.linear(normed, weight, None, scale)
    parts = [normed, product, *([ops.silu_mul(product)] if gated else [])]
    assert counted_of(joined) == sum(map(counted_of, parts)) > 2 * 3 * 7 * 16 * 10
    rows = {row.layer: row for row in CostAnalyzer(network, Step()).run()}
    assert rows[joined.parent].dtype == rows[product.parent].dtype == torch.float8_e4m3fn


def counted_of(tensor: Tensor) -> int:
    return flops(tensor.parent, Layout({}), Step())


@pytest.mark.parametrize(("function", "each"), [(torch.softmax, 5), (torch.sum, 1), (torch.cumsum, 1)])
def test_reductions_count_their_inputs(function: Callable, each: int) -> None:
    network = Network()
    x = network.add_input("x", (3, 5), torch.float32)
    layer = function(x, -1).parent
    assert flops(layer, Layout({}), Step()) == each * math.prod(x.shape)
