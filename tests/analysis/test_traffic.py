"""Bytes of single layers and of fused chains, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from enginery import ops
from enginery.analysis import Cost, CostAnalyzer, Part, Step, find_device, join, profile
from enginery.errors import UsageError
from enginery.network import Dim, Network, Tensor

TOKENS = Dim.symbol("tokens")
DEVICE = find_device("bandwidth=1e9,flops=1e9")


def costs(build: Callable[[Network], object], step: Step | None = None, weights: tuple[str, ...] = ()) -> list[Cost]:
    """Of the layers of a network, in execution order; views have none."""
    network = Network()
    build(network)
    held = [tensor for tensor in network.inputs if tensor.name in weights]
    return [each.cost for each in CostAnalyzer(network, step or Step(), held).run()]


def chains(build: Callable[[Network], Tensor], step: Step | None = None) -> list[Cost]:
    """Of the network as its compiler may fuse it."""
    network = Network()
    network.set_output("out", build(network))
    return [row.total for row in profile(network, step or Step(), DEVICE).rows]


def inputs(network: Network, **shapes: tuple) -> list[Tensor]:
    return [network.add_input(name, shape, torch.float32) for name, shape in shapes.items()]


def test_a_linear_reads_its_weight_and_its_input_and_writes_its_output() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(TOKENS, 8))
        weight, bias = network.add_constant("w", (6, 8), torch.bfloat16), network.add_constant("b", (6,), torch.float32)
        F.linear(x, weight.float(), bias)

    (cast, linear) = costs(build, Step(tokens=3))
    assert cast == Cost(weights=6 * 8 * 2, writes=6 * 8 * 4)  # folded: its input is known
    assert linear == Cost(flops=2 * 3 * 8 * 6, weights=(6 * 8 + 6) * 4, reads=3 * 8 * 4, writes=3 * 6 * 4)
    assert linear.bytes == 216 + 96 + 72
    assert linear.intensity == 288 / 384


def test_what_is_folded_is_in_no_total() -> None:
    network = Network()
    (x,) = inputs(network, x=(4, 8))
    weight = network.add_constant("w", (6, 8), torch.bfloat16)
    network.set_output("out", F.linear(x, weight.float()))
    found = profile(network, Step(), DEVICE)
    assert [row.ops for row in found.rows] == [("linear",)]
    assert found.folded == Cost(weights=6 * 8 * 2, writes=6 * 8 * 4)
    assert "once       288 B more, when weights are bound" in str(found)


def test_weights_may_be_inputs() -> None:
    (cost,) = costs(lambda network: F.linear(*inputs(network, x=(2, 8), w=(6, 8))), weights=("w",))
    assert (cost.weights, cost.reads) == (6 * 8 * 4, 2 * 8 * 4)


def test_a_value_that_is_used_twice_is_read_once() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(4,))
        x + x

    assert costs(build) == [Cost(flops=4, reads=16, writes=16)]


def test_broadcast_and_expanded_values_are_read_once() -> None:
    def build(network: Network) -> None:
        x, y = inputs(network, x=(4, 8), y=(8,))
        x * y
        x * y.unsqueeze(0).expand(4, 8)

    assert costs(build) == [Cost(flops=32, reads=(32 + 8) * 4, writes=128)] * 2


def test_views_cost_nothing_and_copies_what_they_copy() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(4, 6))
        x.view(24).reshape(2, 12).transpose(0, 1)[2:].unsqueeze(0)
        torch.split(x, [2, 4], dim=-1)
        x.transpose(0, 1).reshape(24)

    assert costs(build) == [Cost(reads=96, writes=96)]


def test_fills_and_overwritten_values_are_not_read() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(4, 6))
        torch.zeros_like(x)
        torch.ops.aten.copy(x, network.add_input("y", (6,), torch.float32))
        x.new_empty((5,))

    assert costs(build) == [Cost(writes=96), Cost(reads=24, writes=96), Cost()]


def test_an_embedding_reads_the_rows_that_it_takes() -> None:
    def build(network: Network) -> None:
        ids = network.add_input("ids", (TOKENS,), torch.int64)
        F.embedding(ids, network.add_constant("table", (1000, 16), torch.bfloat16))
        torch.index_select(network.add_input("x", (50, 4), torch.float32), 0, ids)

    embedding, select = costs(build, Step(tokens=3))
    assert embedding == Cost(weights=3 * 16 * 2, reads=3 * 8, writes=3 * 16 * 2)
    assert select == Cost(reads=3 * 4 * 4 + 3 * 8, writes=3 * 4 * 4)


@pytest.mark.parametrize(("tokens", "active"), [(1, 2.0), (2, 8 * (1 - 0.75**2)), (1000, 8.0)])
def test_experts_that_no_token_chose_are_not_read(tokens: int, active: float) -> None:
    def build(network: Network) -> None:
        x = network.add_input("x", (2 * TOKENS, 16), torch.bfloat16)
        weight = network.add_constant("w", (8, 24, 16), torch.bfloat16)
        experts = network.add_input("experts", (2 * TOKENS,), torch.int64)
        network.call(ops.expert_linear, x, weight, experts, network.add_constant("b", (8, 24), torch.bfloat16))

    (cost,) = costs(build, Step(tokens=tokens))
    assert cost.flops == 2 * 2 * tokens * 16 * 24
    assert cost.weights == pytest.approx(active * (24 * 16 + 24) * 2, abs=2)
    assert cost.reads == 2 * tokens * (16 * 2 + 8)


def paged(network: Network, window: int | None) -> None:
    """8 query heads on 2 KV heads of size 16, values of size 12."""
    blocks, sequences = Dim.symbol("num_blocks"), Dim.symbol("sequences")
    q, k, v, keys, values = (
        network.add_input(name, shape, torch.bfloat16)
        for name, shape in {
            "q": (TOKENS, 8, 16), "k": (TOKENS, 2, 16), "v": (TOKENS, 2, 12),
            "key_cache.0": (blocks, 2, 16, 16), "value_cache.0": (blocks, 2, 16, 12),
        }.items()
    )  # fmt: skip
    slots = network.add_input("slot_mapping", (TOKENS,), torch.int64)
    tables = network.add_input("block_tables", (sequences, Dim.symbol("blocks")), torch.int32)
    starts = network.add_input("query_start", (Dim.symbol("sequences_plus_1"),), torch.int32)
    lengths = network.add_input("seq_lens", (sequences,), torch.int32)
    network.call(ops.paged_attention, q, k, v, keys, values, slots, tables, starts, lengths, 1.0, window)


def test_paged_attention_reads_each_key_once_for_its_group_of_heads() -> None:
    (cost,) = costs(lambda network: paged(network, None), Step(tokens=5, sequences=2, context=30))
    keys, pairs = 33 + 32, (31 + 32 + 33) + (31 + 32)  # one sequence of three new tokens, one of two
    each = 2 * (16 + 12) * 2
    assert (cost.kv_reads, cost.kv_writes) == (keys * each, 5 * each)
    assert cost.flops == 2 * 8 * pairs * (16 + 12)
    tables = 5 * 8 + 2 * 3 * 4 + 3 * 4 + 2 * 4
    assert (cost.reads, cost.writes) == (5 * (8 * 16 + 2 * 16 + 2 * 12) * 2 + tables, 5 * 8 * 12 * 2)


def test_paged_attention_reads_no_further_back_than_its_window() -> None:
    (cost,) = costs(lambda network: paged(network, 8), Step(tokens=5, sequences=2, context=30))
    each = 2 * (16 + 12) * 2
    assert (cost.kv_reads, cost.kv_writes) == ((10 + 9) * each, 5 * each)
    assert cost.flops == 2 * 8 * (5 * 8) * (16 + 12)


def test_a_chain_reads_what_comes_in_and_writes_what_goes_out() -> None:
    def build(network: Network) -> Tensor:
        x, weight = inputs(network, x=(4, 8), weight=(8,))
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    assert chains(build) == [Cost(flops=32 + 32 + 4 + 4 + 32 + 32, reads=(32 + 8) * 4, writes=128)]


def test_a_chain_never_goes_through_a_product_and_comes_back() -> None:
    def build(network: Network) -> Tensor:
        x, w = inputs(network, x=(4, 8), w=(8, 8))
        y = torch.relu(x)
        return torch.tanh(F.linear(y, w) + y)

    relu, linear, tail = chains(build)
    assert relu == Cost(flops=32, reads=128, writes=128)
    assert linear.reads == 128 + 256
    assert tail == Cost(flops=64, reads=256, writes=128)


def test_halves_of_a_value_that_is_read_whole_are_not_read_again() -> None:
    def build(network: Network) -> Tensor:
        x, cos, sin = inputs(network, x=(4, 8), cos=(4, 8), sin=(4, 8))
        turned = torch.cat([-x[:, 4:], x[:, :4]], dim=-1)
        return x * cos + turned * sin

    assert chains(build) == [Cost(flops=16 + 32 * 3, reads=3 * 128, writes=128)]


def test_halves_alone_are_read_as_halves() -> None:
    def build(network: Network) -> Tensor:
        (x,) = inputs(network, x=(4, 8))
        return torch.relu(x[:, 4:])

    assert chains(build) == [Cost(flops=16, reads=64, writes=64)]


def test_an_output_behind_a_view_is_written() -> None:
    def build(network: Network) -> Tensor:
        (x,) = inputs(network, x=(4, 8))
        return torch.relu(torch.tanh(x)).view(32)

    assert chains(build) == [Cost(flops=64, reads=128, writes=128)]


def test_equal_chains_are_one_row_and_parts_are_multiplied() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(4, 8))
        for i in range(3):
            with network.inserting_before(None, module_path=f"layers.{i}.act"):
                x = torch.relu(F.linear(x, network.add_constant(f"w{i}", (8, 8), torch.float32)))
        network.set_output("out", x)

    network = Network()
    build(network)
    found = profile(network, Step(), DEVICE, part=Part("twice", 2))
    assert [(row.path, row.ops, row.count) for row in found.rows] == [
        ("layers.*.act", ("linear",), 6),
        ("layers.*.act", ("relu",), 6),
    ]
    both = join([found, profile(network, Step(), DEVICE, part=Part("once"))])
    assert both.cost * 2 == found.cost * 3
    assert both.of_part(Part("once")).cost * 2 == found.cost
    assert both.seconds == pytest.approx(1.5 * found.seconds)


def test_an_operator_without_a_rule_is_said_and_its_bytes_are_counted() -> None:
    network = Network()
    (x,) = inputs(network, x=(1, 2, 8))
    network.set_output("out", F.avg_pool1d(x, 2))
    found = profile(network, Step(), DEVICE)
    assert found.unknown == (("aten.avg_pool1d", 1),)
    assert found.cost == Cost(reads=64, writes=32)
    assert "aten.avg_pool1d × 1: only bytes are counted" in str(found)


def test_a_symbol_without_a_value_is_named() -> None:
    def build(network: Network) -> None:
        (x,) = inputs(network, x=(Dim.symbol("height"), 8))
        torch.relu(x)

    with pytest.raises(UsageError, match=r"size height has no value. Name it in the sizes of the step"):
        costs(build)
    assert costs(build, Step(sizes={"height": 3})) == [Cost(flops=24, reads=96, writes=96)]


@pytest.mark.parametrize(
    ("args", "words"), [((1, 2), "1 new tokens cannot be divided over 2"), ((1, 0), "--sequences 0")]
)
def test_an_impossible_step_is_refused(args: tuple[int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Step(*args)
