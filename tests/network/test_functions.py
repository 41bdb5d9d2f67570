"""PyTorch over Tensors: which operator each spelling means, by torch.export as the referee."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from enginery import ops
from enginery.errors import NetworkError
from enginery.network import Dim, Network, Tensor, operator_name, resolve

aten = torch.ops.aten
N = Dim.symbol("n")

EXPRESSIONS: list[Callable[..., Any]] = [
    lambda x, w, i: x + 1,
    lambda x, w, i: 1 - x,
    lambda x, w, i: 2 / (x + 3),
    lambda x, w, i: 2**x,
    lambda x, w, i: x**2,
    lambda x, w, i: x // 2 + x % 2,
    lambda x, w, i: (x > 0) & (x < 1),
    lambda x, w, i: ~(x >= 0) | (x <= 0),
    lambda x, w, i: -x * abs(x),
    lambda x, w, i: x @ w,
    lambda x, w, i: x.T,
    lambda x, w, i: F.linear(x, w),
    lambda x, w, i: F.linear(x, w, w[0]),
    lambda x, w, i: torch.add(x, x, alpha=2),
    lambda x, w, i: F.silu(x) * torch.sigmoid(x),
    lambda x, w, i: F.gelu(x, approximate="tanh"),
    lambda x, w, i: F.relu(x) + F.relu(x, inplace=False),
    lambda x, w, i: F.softmax(x, dim=-1),
    lambda x, w, i: torch.softmax(x, -1, dtype=torch.float64),
    lambda x, w, i: x.softmax(dim=1),
    lambda x, w, i: F.log_softmax(x, dim=-1),
    lambda x, w, i: F.embedding(i, w),
    lambda x, w, i: F.layer_norm(x, (8,), w[0], w[1], 1e-6),
    lambda x, w, i: F.rms_norm(x, (8,), w[0], 1e-6),
    lambda x, w, i: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    lambda x, w, i: torch.cat([x, x], dim=-1),
    lambda x, w, i: torch.stack((x, x)),
    lambda x, w, i: x.view(-1, 2, 4).transpose(0, 1),
    lambda x, w, i: x.reshape(4, -1).permute(1, 0),
    lambda x, w, i: x.unsqueeze(0).squeeze(0).flatten(),
    lambda x, w, i: x.expand(3, -1, -1).repeat(1, 2, 1),
    lambda x, w, i: torch.split(x, 3, dim=-1)[0],
    lambda x, w, i: x.split([2, 6], dim=1)[1],
    lambda x, w, i: x.chunk(2, dim=-1)[0],
    lambda x, w, i: x.unbind(1)[0],
    lambda x, w, i: x[..., :4],
    lambda x, w, i: x[1:, None],
    lambda x, w, i: x[0, ::2],
    lambda x, w, i: x[:, -1],
    lambda x, w, i: x[i],
    lambda x, w, i: x[:, i],
    lambda x, w, i: x.float().double(),
    lambda x, w, i: x.to(torch.bfloat16),
    lambda x, w, i: x.half().to(x),
    lambda x, w, i: x.long().bool(),
    lambda x, w, i: x.type_as(i),
    lambda x, w, i: x.sum() + x.sum(-1).mean(),
    lambda x, w, i: torch.sum(x, dim=[0, 1]),
    lambda x, w, i: x.max(-1).values,
    lambda x, w, i: torch.max(x),
    lambda x, w, i: torch.max(x, x + 1),
    lambda x, w, i: x.amax(-1, keepdim=True),
    lambda x, w, i: x.argmax(-1),
    lambda x, w, i: x.topk(2).indices,
    lambda x, w, i: x.cumsum(-1),
    lambda x, w, i: torch.where(x > 0, x, -x),
    lambda x, w, i: torch.where(x > 0, x, 0.0),
    lambda x, w, i: x.masked_fill(x > 0, float("-inf")),
    lambda x, w, i: torch.clamp(x, min=0.0),
    lambda x, w, i: x.clamp(0, 1),
    lambda x, w, i: torch.zeros_like(x) + x.new_zeros(1),
    lambda x, w, i: torch.einsum("ab,cb->ac", x, w),
    lambda x, w, i: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    lambda x, w, i: F.dropout(x, 0.1, training=True),
    lambda x, w, i: x.clone(),
    lambda x, w, i: F.pad(x, (1, 2)),
    lambda x, w, i: torch.outer(x[0], x[1]),
    lambda x, w, i: x.tril(),
    lambda x, w, i: torch.bitwise_and(i, 1),
    lambda x, w, i: F.one_hot(i, 5),
    lambda x, w, i: torch.index_select(x, 0, i),
    lambda x, w, i: torch.gather(x, 1, i[:, None]),
    lambda x, w, i: F.glu(x),
]


class Expression(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> Any:
        return self.function(x, w, i)


def calls(network: Network) -> list[tuple[str, list[str]]]:
    return [(operator_name(layer.op), [repr(_plain(value)) for value in layer.args]) for layer in network]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"{value.dtype}{value.shape}"
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)))
def test_a_call_over_tensors_is_what_torch_export_gives(number: int) -> None:
    function = EXPRESSIONS[number]
    x, w, i = torch.rand(4, 8), torch.rand(8, 8), torch.tensor([1, 0, 2, 3])
    exported = Network.from_module(Expression(function).train("dropout" in str(function)), (x, w, i))
    written = Network()
    values = [
        written.add_input(name, tuple(value.shape), value.dtype) for name, value in (("x", x), ("w", w), ("i", i))
    ]
    result = function(*values)
    written.set_output("output", result)
    written.prune()
    assert calls(written) == calls(exported)


def test_spellings_mean_one_call() -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    spellings = [
        (torch.add, (x, x), {}),
        (torch.Tensor.add, (x, x), {}),
        (aten.add, (x, x), {}),
        (aten.add.Tensor, (x, x), {}),
        (aten.add.Tensor, (x,), {"other": x}),
        (torch.add, (x,), {"other": x, "alpha": 1}),
        (torch.add, (), {"input": x, "other": x}),
    ]
    assert {resolve(*spelling) for spelling in spellings} == {(aten.add.Tensor, (x, x, 1))}
    assert (
        resolve(F.softmax, (x,), {"dim": -1})
        == resolve(torch.softmax, (x, -1))
        == resolve(aten.softmax.int, (x, -1, None))
    )
    assert resolve(torch.Tensor.view, (x, 4, 2, N)) == resolve(aten.view, (x, [4, 2, N]))
    assert resolve(torch.Tensor.to, (x, "cuda", torch.bfloat16)) == resolve(torch.Tensor.bfloat16, (x,))
    assert resolve(torch.clamp, (x, 0)) == resolve(torch.Tensor.clamp, (x,), {"min": 0})
    assert resolve(torch.Tensor.mean, (x,), {"axis": 1}) == resolve(torch.mean, (x, 1))


class Wild:
    """A stand-in for a tensor, as patterns are."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return resolve(function, args, kwargs)


def test_anything_with_torch_function_counts_as_a_tensor() -> None:
    wild = Wild()
    assert F.linear(wild, wild) == (aten.linear.default, (wild, wild, None))
    assert torch.cat([wild, wild], dim=1) == (aten.cat.default, ((wild, wild), 1))
    assert torch.softmax(wild, wild) == (aten.softmax.int, (wild, wild, None))
    assert ops.attention(wild, wild, wild, wild)[1][:4] == (wild, wild, wild, wild)
    assert torch.reshape(wild, (N, 4)) == (aten.reshape.default, (wild, (N, 4)))


def test_an_ellipsis_stands_for_the_rest() -> None:
    wild = Wild()
    op, args = ops.attention(wild, ..., causal=True)
    assert op is ops.attention
    assert args == (wild, ..., ..., ..., True, ..., ..., ..., ...)
    assert aten.linear.default(wild, ...) == (aten.linear.default, (wild, ..., ...))


def test_sizes_may_be_symbolic_anywhere() -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    assert torch.reshape(x, (2 * N, 4)).shape == (2 * N, 4)
    assert x.new_full((N, N), 1.0).shape == (N, N)
    assert x[: N - 1].shape == (N - 1, 8)
    assert torch.narrow(x, 0, 0, N).shape == (N, 8)
    assert (x * N).dtype == torch.float32
    assert aten.arange(N) if False else network.call(aten.arange.default, N).shape == (N,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.item(), "item"),
        (lambda x: x.add_(1), "writes to its argument"),
        (lambda x: F.interpolate(x), "interpolate"),
        (lambda x: F.embedding(x, x, max_norm=1.0), "max_norm"),
        (lambda x: torch.full((N, N), 0.0), "names no network"),
        (lambda x: x["a"], "cannot be indexed"),
        (lambda x: aten.softmax(x, "rows"), "softmax"),
        (lambda x: aten.linear.default(x, x, weigth=x), "no argument is named 'weigth'"),
        (lambda x: aten.linear.default(x), "'weight' is missing"),
        (lambda x: aten.linear.default(x, x, weight=x), "given twice"),
        (lambda x: x + torch.rand(4, 8), "tensor"),
        (lambda x: x.view(0.5), "no form of view"),
    ],
)
def test_what_is_no_call_is_one_clear_error(call: Callable, message: str) -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    with pytest.raises(NetworkError, match=message):
        call(x)
    assert len(network) == 0


def test_results_of_several_outputs_have_names() -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    top = torch.topk(x, 2)
    assert top.values.shape == (N, 2)
    assert top.indices.dtype == torch.int64
    assert top.indices.parent is top.values.parent
