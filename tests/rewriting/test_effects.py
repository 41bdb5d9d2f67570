"""Calls that write are barriers, for whatever shares the memory that they write to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import NetworkError
from enginery.network import Network
from enginery.network.layer import base_of
from enginery.rewriting import PatternRewriter, RewritePatternManager, Var

aten = torch.ops.aten
paged_attention = torch.ops.enginery.paged_attention.default


def cache_network(read, write=lambda pool: pool, *, late=False):
    """Reads the keys before (or after) a write to them, and uses what was read after it."""
    network = Network()
    query = network.add_input("query", (2, 1, 4), torch.float32)
    keys, values = (network.add_input(name, (3, 1, 16, 4), torch.float32) for name in ("keys", "values"))
    tables = [
        network.add_input("slots", (2,), torch.int64), network.add_input("blocks", (1, 1), torch.int32),
        network.add_input("starts", (2,), torch.int32), network.add_input("lengths", (1,), torch.int32),
    ]  # fmt: skip
    early = None if late else read(keys)
    attended = network.call(paged_attention, query, query, query, write(keys), values, *tables, 0.5)
    network.set_output("attended", attended)
    network.set_output("out", torch.relu(early if early is not None else read(keys)))
    network.verify()
    return network


def same(pool):
    return pool


def flat(pool):
    return pool.view(3, 64)


def rows(pool):
    return pool.reshape(48, 4).transpose(0, 1)


class ReadLater(PatternRewriter):
    """relu(exp(x)), at the place of the relu"""

    pattern = torch.relu(torch.exp(Var("x")))

    def rewrite(self, x):
        return torch.exp(torch.clamp(x, -50.0))


class ReadLaterByHand(PatternRewriter):
    root_layer = (aten.relu.default,)

    def match_and_rewrite(self, layer):
        inner = layer.args[0].parent
        return torch.exp(torch.clamp(inner.args[0], -50.0)) if inner and inner.op is aten.exp.default else None


@pytest.mark.parametrize("rule", [ReadLater, ReadLaterByHand])
@pytest.mark.parametrize("read", [same, flat, rows])
@pytest.mark.parametrize("write", [same, lambda pool: pool.view(3, 1, 16, 4), lambda pool: pool.expand(3, 1, 16, 4)])
def test_a_read_does_not_move_behind_a_write_to_what_it_views(rule, read, write):
    network = cache_network(lambda pool: torch.exp(read(pool)), write)
    before = str(network)
    report = RewritePatternManager(rule()).rewrite(network)
    ((reason, count),) = report[rule.__name__].declined.items()
    assert (reason, count) == ("it would read keys after paged_attention wrote to it", 1)
    assert str(network) == before


@pytest.mark.parametrize("rule", [ReadLater, ReadLaterByHand])
@pytest.mark.parametrize("read", [same, flat])
def test_a_read_after_the_write_may_be_rewritten(rule, read):
    network = cache_network(lambda pool: torch.exp(read(pool)), late=True)
    assert RewritePatternManager(rule()).rewrite(network).rewritten == 1


def test_a_copy_is_no_view():
    network = cache_network(lambda pool: torch.exp(pool.clone()))
    assert RewritePatternManager(ReadLater()).rewrite(network).rewritten == 1
    other = cache_network(lambda pool: torch.exp(pool.double()))
    assert RewritePatternManager(ReadLater()).rewrite(other).rewritten == 1


class DropClone(PatternRewriter):
    pattern = aten.clone.default(Var("x"), ...)

    def rewrite(self, x):
        return x


def test_a_copy_taken_before_a_write_stays():
    network = cache_network(lambda pool: flat(pool).clone())
    report = RewritePatternManager(DropClone()).rewrite(network)
    assert dict(report["DropClone"].declined) == {"it would read keys after paged_attention wrote to it": 1}
    assert RewritePatternManager(DropClone()).rewrite(cache_network(torch.clone, late=True)).rewritten == 1


class Common(PatternRewriter):
    """the first of equal calls"""

    root_layer = (aten.exp.default,)

    def match_and_rewrite(self, layer):
        others = [
            other for other in layer.network if other.op is layer.op and other.args[0].shape == layer.args[0].shape
        ]
        return others[0].output if others[0] is not layer else None


def test_a_value_computed_before_a_write_does_not_stand_for_one_computed_after():
    network = cache_network(lambda pool: torch.exp(flat(pool)))
    late = torch.exp(flat(network.tensor("keys")))
    network.set_output("late", late)
    report = RewritePatternManager(Common()).rewrite(network)
    assert "it would read keys before paged_attention wrote to it" in report["Common"].declined
    assert network.tensor("exp") is not network.tensor("exp_1")


def test_views_of_views_have_one_base_and_copies_their_own():
    network = cache_network(lambda pool: torch.exp(rows(flat(pool))))
    keys = network.tensor("keys")
    (exp,) = (layer for layer in network if layer.op is aten.exp.default)
    assert base_of(exp.args[0]) is keys
    assert base_of(exp.output) is exp.output
    parts = torch.split(keys, 1)
    assert {base_of(part) for part in parts} == {keys}


def test_a_write_to_a_view_of_a_computed_value_is_no_network():
    with pytest.raises(NetworkError, match="writes to view, which is no input"):
        cache_network(same, lambda pool: (pool + 1).view(3, 1, 16, 4))


def test_the_write_itself_may_be_rewritten_with_its_pool():
    class Scale(PatternRewriter):
        root_layer = (paged_attention,)

        def match_and_rewrite(self, layer):
            return layer.replace(scale=1.0) if layer.arguments["scale"] == 0.5 else None

    network = cache_network(lambda pool: F.silu(flat(pool)), lambda pool: pool.view(3, 1, 16, 4))
    assert RewritePatternManager(Scale()).rewrite(network).rewritten == 1
