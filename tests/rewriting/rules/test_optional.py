"""Rules of the library that are off by default: how they are switched on, and where they run then."""

from __future__ import annotations

import pytest

from enginery.cli.user_rules import load_rule
from enginery.errors import UsageError
from enginery.network import Network
from enginery.rewriting.pipeline import PipelineConfig, nearest_miss, optional_rules, run_phases
from enginery.rewriting.rules.scale_into_linear import ScaleIntoLinear

DECODER = """network 1
input %token_ids: int64[tokens]
constant %embed: float32[40, 8]
constant %head: float32[40, 8]
%x: float32[tokens, 8] = aten.embedding(%embed, %token_ids)
%y: float32[tokens, 40] = aten.linear(%x, %head)
%logits: float32[tokens, 40] = aten.mul.Tensor(%y, 0.25)
output logits = %logits
"""


def phases_of(config: PipelineConfig, rule: str) -> list[str]:
    report = run_phases(Network.parse(DECODER), config)
    return [name for name, phase in report.phases if rule in phase.rules and phase[rule].rewritten]


def test_off_by_default_and_on_by_name_in_its_phase() -> None:
    assert phases_of(PipelineConfig(), "ScaleIntoLinear") == []
    assert phases_of(PipelineConfig(rules=(load_rule("ScaleIntoLinear"),)), "ScaleIntoLinear") == ["fold factors"]


def test_on_and_off_is_off() -> None:
    config = PipelineConfig(rules=(ScaleIntoLinear(),), disabled_rules=("ScaleIntoLinear",))
    assert phases_of(config, "ScaleIntoLinear") == []


def test_why_a_rule_that_is_off_would_not_fit() -> None:
    assert nearest_miss(Network.parse(DECODER), "ScaleIntoLinear") is None
    miss = nearest_miss(Network.parse(DECODER), "FuseSiluMul")
    assert miss is not None
    assert "silu" in miss.reason


def test_an_unknown_name_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"no rule is named 'ScaleLinear'\. Near: ScaleIntoLinear") as caught:
        load_rule("ScaleLinear")
    assert "\n" not in str(caught.value)


def test_no_rule_is_both() -> None:
    on = run_phases(Network.parse(DECODER)).counts
    assert not set(on) & set(optional_rules())
