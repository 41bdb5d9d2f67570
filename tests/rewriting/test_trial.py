"""A rule tried at a layer: why its code declines, and that nothing remains of the trial."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from enginery.network import Layer, Network
from enginery.rewriting import MatchFailure, PatternRewriter, Var
from enginery.rewriting.explain import explain
from rewriting.building import network_of


class Base(PatternRewriter):
    pattern = F.relu(Var("x"))


class Returns(Base):
    def rewrite(self, x: Any) -> Any:
        return F.silu(x)


class Condition(Base):
    def rewrite(self, x: Any) -> Any:
        made = F.silu(x)
        if x.shape[-1] > 2:
            return None
        return made


class InAHelper(Base):
    def rewrite(self, x: Any) -> Any:
        return helper(F.silu(x))


class InOneLine(Base):
    def rewrite(self, x: Any) -> Any:
        return F.silu(x) if x.dtype == torch.float64 else None


class Says(Base):
    def rewrite(self, x: Any) -> Any:
        x.network.add_constant("table", (2,), torch.float32, torch.zeros(2))
        F.silu(x)
        raise MatchFailure("the moon is full")


class Raises(Base):
    def rewrite(self, x: Any) -> Any:
        return F.silu(x)[None].shape[7]


class Imperative(PatternRewriter):
    root_layer = (torch.ops.aten.relu.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        if layer.inputs[0].is_input:
            return False
        return layer.inputs[0]


def helper(x: Any) -> Any:
    if x.rank == 2:
        return None
    return x


@pytest.fixture
def network() -> Network:
    return network_of(lambda x, y, w: F.relu(x) + y)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Condition, "its code declines by `if x.shape[-1] > 2:` (test_trial.py:"),
        (InAHelper, "its code declines by `if x.rank == 2:` (test_trial.py:"),
        (InOneLine, "its code declines by `return F.silu(x) if x.dtype == torch.float64 else None` (test_trial.py:"),
        (Says, "the moon is full"),
        (Raises, "it raises IndexError: "),
        (Imperative, "its code declines by `if layer.inputs[0].is_input:` (test_trial.py:"),
    ],
)
def test_the_reason_is_in_words_and_nothing_remains(network: Network, rule: type, reason: str) -> None:
    text, trace = str(network), sys.gettrace()
    miss = explain(network, rule())
    assert miss is not None
    assert miss.layer == "relu"
    assert miss.reason.startswith(reason)
    assert str(network) == text
    assert "table" not in network.values
    assert sys.gettrace() is trace
    network.verify()


def test_a_rule_that_would_rewrite_misses_nothing(network: Network) -> None:
    text = str(network)
    assert explain(network, Returns()) is None
    assert str(network) == text
