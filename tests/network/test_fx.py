"""Import from torch.export and export to fx: names, symbols, constants, functionalisation, refusals, stability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim as ExportDim
from torch.nn import functional as F

from enginery.errors import NetworkError
from enginery.network import Dim, Network, Tensor

TOKENS = ExportDim("tokens", min=2, max=64)
N = Dim.symbol("tokens")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, 4, 4).unbind(1)
        scores = torch.einsum("thd,shd->hts", q, k) * self.scale
        mask = torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1)
        weights = (scores + mask).softmax(-1, dtype=torch.float32)
        return self.out(torch.matmul(weights, v.transpose(0, 1)).transpose(0, 1).reshape(x.shape[0], -1))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        positions = torch.arange(ids.shape[0]) + 1
        x = x + positions[:, None] * 0.01
        for layer in self.layers:
            x = x + layer(F.dropout(x, 0.1, self.training))
        return self.head(self.norm(x))[-1:]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def network(decoder: Decoder) -> Network:
    return Network.from_module(decoder, (torch.arange(7),), dynamic_shapes={"ids": {0: TOKENS}})


def test_import_computes_the_same_at_other_sizes(decoder: Decoder, network: Network) -> None:
    network.verify()
    for tokens in (2, 5, 33):
        ids = torch.randint(0, 20, (tokens,))
        torch.testing.assert_close(network(ids, **weights_of(decoder)), decoder(ids))


def test_names_symbols_constants(network: Network) -> None:
    assert [(tensor.name, tensor.shape) for tensor in network.inputs] == [("ids", (N,))]
    assert network.ranges == {"tokens": (2, 64)}
    constants = {tensor.name for tensor in network.constants}
    assert {"embed.weight", "layers.0.qkv.weight", "layers.1.out.weight", "layers.0.scale"} <= constants
    assert "head.weight" not in constants, "tied to embed.weight"
    assert set(network.values) == {"layers.0.scale", "layers.1.scale"}
    linear = network.layer("layers.0.qkv.linear")
    assert linear.module_path == "layers.0.qkv"
    assert linear.arguments["weight"].name == "layers.0.qkv.weight"
    assert network.layer("head.linear").arguments["weight"].name == "embed.weight"
    assert len(network.layer("layers.1.unbind").outputs) == 3
    assert not any("sym_size" in layer.name or "getitem" in layer.name or "assert" in layer.name for layer in network)
    assert not any(layer.op is torch.ops.aten.dropout.default for layer in network)


def test_a_module_on_meta_has_names_and_no_values() -> None:
    with torch.device("meta"):
        module = Decoder().eval()
        network = Network.from_module(module, (torch.arange(7),), dynamic_shapes={"ids": {0: TOKENS}})
    network.verify()
    assert network.values == {}
    assert {"embed.weight", "layers.0.scale"} <= {tensor.name for tensor in network.constants}


def test_export_import_export_is_stable(decoder: Decoder, network: Network) -> None:
    again = exported_again(network)
    ids = torch.randint(0, 20, (9,))
    constants = {**weights_of(decoder), **network.values}
    first = network.to_graph_module()
    torch.testing.assert_close(first(ids, *(constants[t.name] for t in network.constants))[0], decoder(ids))
    assert text_of(exported_again(again)) == text_of(again)
    assert len(again) == len(network)
    assert [layer.op for layer in again] == [layer.op for layer in network]


def exported_again(network: Network) -> Network:
    def example(tensor: Tensor) -> torch.Tensor:
        shape = [size.substitute({"tokens": 7}) if isinstance(size, Dim) else size for size in tensor.shape]
        return torch.zeros(shape, dtype=tensor.dtype)

    values = [example(tensor) for tensor in (*network.inputs, *network.constants)]
    shapes = ({0: TOKENS}, *[None] * (len(values) - 1))
    return Network.from_module(network.to_graph_module(), tuple(values), dynamic_shapes=shapes)


def text_of(network: Network) -> str:
    return str(network)


def test_graph_module_has_readable_names_and_one_size_per_symbol(network: Network) -> None:
    module = network.to_graph_module()
    names = [node.name for node in module.graph.nodes]
    assert "layers_0_qkv_linear" in names
    assert sum(node.target is torch.ops.aten.sym_size.int for node in module.graph.nodes) == 1
    module.graph.lint()


class Body(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def _add_(self: Body, x: torch.Tensor) -> Any:
    y = x * 2
    y.add_(1)
    z = y + 1
    y.mul_(3)
    return y, z


def _slice_fill(self: Body, x: torch.Tensor) -> Any:
    y = x.clone()
    before = y.sum()
    y[:, :2] = 0
    y[0] = 5.0
    return y, before, y.sum()


def _view_of_view(self: Body, x: torch.Tensor) -> Any:
    y = x.clone()
    view = y[1:].t()
    view[2:4].mul_(2)
    return y, view


def _reader_of_a_view(self: Body, x: torch.Tensor) -> Any:
    y = x.clone()
    row = y[0]
    y.add_(1)
    return row * 2


def _index_put(self: Body, x: torch.Tensor) -> Any:
    y = torch.zeros_like(x)
    y[torch.tensor([0, 2])] = 1.0
    y.masked_fill_(x > 0, -1.0)
    return y


def _copy(self: Body, x: torch.Tensor) -> Any:
    y = torch.zeros(x.shape[0], 8, dtype=torch.float64)
    y.copy_(x)
    return y


def _unbind_write(self: Body, x: torch.Tensor) -> Any:
    y = x.clone().view(-1)
    y[3:5] += 1
    return y.view(x.shape)


@pytest.mark.parametrize(
    "body", [_add_, _slice_fill, _view_of_view, _reader_of_a_view, _index_put, _copy, _unbind_write]
)
def test_writes_to_intermediates_become_functions(body: Callable) -> None:
    module, x = Body(body), torch.randn(4, 8)
    network = Network.from_module(module, (x,))
    network.verify()
    assert not any(layer.op._schema.is_mutable for layer in network)
    results = network.run([x], weights_of(module))
    expected = module(x)
    for left, right in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(left, right)


def _write_input(self: Body, x: torch.Tensor) -> Any:
    return x.add_(1)


def _write_buffer(self: Body, x: torch.Tensor) -> Any:
    self.table.add_(1)
    return x + self.table


def _write_reshape(self: Body, x: torch.Tensor) -> Any:
    y = x * 2
    y.reshape(-1)[0] = 1
    return y


def _data_dependent(self: Body, x: torch.Tensor) -> Any:
    return x[x > 0]


def _branch(self: Body, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))


def _python_branch(self: Body, x: torch.Tensor) -> Any:
    return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_write_input, "writes to an input"),
        (_write_buffer, "writes to an input or a constant"),
        (_write_reshape, "may or may not copy"),
        (_data_dependent, "depends on data"),
        (_branch, "control flow cond"),
        (_python_branch, "cannot be exported"),
    ],
)
def test_what_has_no_form_is_refused_by_name(body: Callable, message: str) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        Network.from_module(Body(body), (torch.randn(4, 8),))
    assert "\n" not in str(caught.value)


def test_switched_off_gradients_and_autocast_are_inlined() -> None:
    def body(self: Body, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = x * self.table
        with torch.autocast("cpu", enabled=False):
            return y.float() @ x.float().T

    module, x = Body(body), torch.randn(4, 8)
    network = Network.from_module(module, (x,))
    torch.testing.assert_close(network(x, **weights_of(module)), module(x))


def test_symbols_without_names_are_numbered_and_relations_kept() -> None:
    def body(self: Body, x: torch.Tensor, y: torch.Tensor) -> Any:
        return torch.cat([x, y])[1:] * 2

    auto = torch.export.Dim.AUTO
    network = Network.from_module(
        Body(body), (torch.randn(4, 8), torch.randn(5, 8)), dynamic_shapes=((({0: auto}), {0: auto}),)
    )
    assert [tensor.shape[0].name for tensor in network.inputs] == ["s0", "s1"]
    assert str(network.outputs[0].shape[0]) == "s0 + s1 - 1"
    network.verify()


def test_symbolic_arithmetic_becomes_literals() -> None:
    def body(self: Body, x: torch.Tensor) -> Any:
        half = x.shape[0] // 2
        return x[: x.shape[0] - 1] * half, x.new_zeros(torch.sym_max(x.shape[0], 9)), torch.arange(x.shape[0] * 2 + 1)

    few = ExportDim("few", min=4, max=64)
    network = Network.from_module(Body(body), (torch.randn(6, 8),), dynamic_shapes=(({0: few},),))
    network.verify()
    for tokens in (4, 7, 20):
        x = torch.randn(tokens, 8)
        for left, right in zip(network(x), body(Body(body), x), strict=True):
            torch.testing.assert_close(left, right)
    assert str(Network.parse(str(network))) == str(network)


def test_a_llama_of_transformers_round_trips() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    module, ids = Logits(), torch.randint(0, 50, (1, 9))
    shapes = {"ids": {1: TOKENS}}
    network = Network.from_module(module, (ids,), dynamic_shapes=shapes)
    network.verify()
    text = str(network)
    assert str(Network.parse(text)) == text
    longer = torch.randint(0, 50, (1, 23))
    constants = {**weights_of(module), **dict(module.named_buffers())}
    torch.testing.assert_close(network(longer, **constants), module(longer), atol=1e-5, rtol=1e-5)
    assert len([layer for layer in network if layer.module_path.endswith("mlp.gate_proj")]) == 2
