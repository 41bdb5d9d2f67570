"""Outlining: equal layers share a region, values cross regions, and the pieces compute what the whole computes."""

from __future__ import annotations

import pytest
import torch
from tests.engine.decoder import Decoder, imported, reader

from enginery.engine.binding import WeightEvaluator, split
from enginery.engine.regions import Outline, outline
from enginery.network import Network
from enginery.rewriting.pipeline import PipelineConfig, run_phases


def rewritten(model: Decoder, device: str = "cpu") -> Network:
    network = imported(model).network
    run_phases(network, PipelineConfig(device=device))
    return network


def cut(model: Decoder) -> tuple[Network, Outline]:
    parts = split(rewritten(model))
    return parts.network, outline(parts.network)


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_equal_layers_share_one_region(layers: int) -> None:
    _, regions = cut(Decoder(layers))
    assert len(regions.regions) == layers + 2
    assert len(regions.distinct) == 3
    blocks = [region for region in regions.regions if region.name.startswith("layers.")]
    assert len({region.key for region in blocks}) == 1
    assert len({region.bindings for region in blocks}) == layers


@pytest.mark.parametrize("window", [None, 5])
def test_folded_each_distinct_region_is_there_once_and_reads_what_is_given(window: int | None) -> None:
    network, regions = cut(Decoder(6, window=window))
    folded = regions.folded()
    assert [region.key for region in folded.regions] == list(regions.distinct)
    given = {*network.inputs, *network.constants}
    for region, whole in zip(folded.regions, regions.distinct.values(), strict=True):
        assert given.issuperset(region.bindings)
        assert [(t.shape, t.dtype) for t in region.bindings] == [(t.shape, t.dtype) for t in whole.bindings]
        given.update(region.results)
    assert given.issuperset(network.outputs)
    assert folded.folded() == folded


def test_layers_with_a_window_are_another_region() -> None:
    _, regions = cut(Decoder(4, window=5))
    assert len(regions.distinct) == 4
    keys = [region.key for region in regions.regions if region.name.startswith("layers.")]
    assert keys[0] == keys[2] != keys[1] == keys[3]


def test_a_single_layer_is_no_repetition() -> None:
    _, regions = cut(Decoder(1))
    assert [region.name for region in regions.regions] == ["network"]


def test_regions_hold_every_layer_once_and_are_sound() -> None:
    network, regions = cut(Decoder(4, window=5))
    assert sum(len(region.network) for region in regions.regions) == len(network)
    for region in regions.regions:
        region.network.verify()
        assert Network.parse(str(region.network)).diff(region.network) == ""
        assert f"# {region.name}" in str(region)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_regions_compute_what_the_network_computes(device: str, dtype: torch.dtype) -> None:
    """A GPU's blocks hand on two values: the addition that ends one belongs to the norm that begins the next."""
    model = Decoder(4, window=5).to(dtype)
    source = rewritten(model, device)
    parts = split(source)
    evaluator = WeightEvaluator(source, parts.weights.values(), reader(model))
    weights = {name: evaluator.value(tensor) for name, tensor in parts.weights.items()}
    inputs = example_inputs(parts.network, tokens=11)
    (whole,) = parts.network.run([value.clone() for value in inputs], weights)
    values = dict(zip(parts.network.inputs, inputs, strict=True))
    values.update((tensor, weights[tensor.name]) for tensor in parts.network.constants)
    for region in outline(parts.network).regions:
        results = region.network.run([values[tensor] for tensor in region.bindings])
        values.update(zip(region.results, results, strict=True))
    torch.testing.assert_close(values[parts.network.outputs[0]], whole, rtol=0, atol=0)


def example_inputs(network: Network, tokens: int) -> list[torch.Tensor]:
    """One sequence from its beginning."""
    known = {
        "token_ids": torch.randint(0, 96, (tokens,)), "positions": torch.arange(tokens),
        "slot_mapping": torch.arange(tokens) + 16, "block_tables": torch.tensor([[1, 2]], dtype=torch.int32),
        "query_start": torch.tensor([0, tokens], dtype=torch.int32), "seq_lens": torch.tensor([tokens],
        dtype=torch.int32), "logits_indices": torch.tensor([tokens - 1, 3]),
    }  # fmt: skip
    return [known[t.name] if t.name in known else torch.zeros([4, *t.shape[1:]], dtype=t.dtype) for t in network.inputs]


def test_a_value_that_skips_blocks_and_layers_outside_of_blocks() -> None:
    class Skipping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.blocks[0](x)
            y = first
            for block in self.blocks[1:]:
                y = block(y * 2)  # the product belongs to no block
            return (y + first).sum(-1)

    module, x = Skipping(), torch.randn(5, 8)
    tokens = torch.export.Dim("tokens", min=1, max=64)
    network = Network.from_module(module, (x,), dynamic_shapes={"x": {0: tokens}})
    parts = split(network)
    regions = outline(parts.network)
    state = module.state_dict()
    values = {parts.network.inputs[0]: x}
    values.update((tensor, state[tensor.name]) for tensor in parts.network.constants)
    for region in regions.regions:
        results = region.network.run([values[tensor] for tensor in region.bindings])
        values.update(zip(region.results, results, strict=True))
    assert len(regions.regions) > 2
    torch.testing.assert_close(values[parts.network.outputs[0]], module(x))


def test_weights_are_expressions_that_are_computed_once() -> None:
    model = Decoder(2)
    source = rewritten(model)
    parts = split(source)
    reads: list[str] = []
    read = reader(model)

    def counted(name: str) -> torch.Tensor:
        reads.append(name)
        return read(name)

    evaluator = WeightEvaluator(source, parts.weights.values(), counted)
    for tensor in parts.weights.values():
        evaluator.value(tensor)
    assert len(reads) == len(set(reads))
    assert evaluator._values == {}
    assert all(not layer.is_constant for layer in parts.network)
