"""The benchmark of rules: every rule has its place, gains are those of paired times, the document is up to date."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.benchmarks.conftest import BENCHMARKS

import rule_table
import rules
from enginery.rewriting.pipeline import rule_names
from rule_models import FIRES, ON_GPU

DOCUMENT = BENCHMARKS.parent / "docs" / "rules.md"
UNMEASURED = {"CancelUnsqueeze", "DeadCode", "QuantiseLinears"}
"""two fire on none of the models: other frontends and rules of a user's own leave such calls; one is no equality"""


def test_every_rule_is_measured_somewhere() -> None:
    arms = [arm for fires in (*FIRES.values(), ON_GPU) for arm in fires]
    measured = {rule for arm in arms for rule in arm.split(rule_table.TOGETHER)}
    assert measured <= set(rule_names())
    assert set(rule_names()) - measured <= UNMEASURED


def test_the_document_names_every_rule_with_its_equation_and_default(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    for row in rule_table.table(tmp_path).splitlines():
        beginning = row.removesuffix("| – | – |")  # the gains are those of the records
        assert any(line.startswith(beginning) for line in text.splitlines()), beginning


def ticking(seconds: list[float]) -> Any:
    times: Iterator[float] = iter(seconds)
    return lambda: next(times)


def test_gains_are_medians_of_pairs_without_the_first_two() -> None:
    found = rules.compare(ticking([9.0, 9.0, 2.0, 3.0, 4.0]), ticking([1.0, 1.0, 1.0, 2.0, 2.0]), rounds=3)
    assert found["gain, %"] == pytest.approx(100.0)
    assert found["without, µs"] == pytest.approx(3e6)
    assert found["with, µs"] == pytest.approx(2e6)


def test_a_batch_has_slots_and_tables_of_its_own_for_each_sequence() -> None:
    values = rules.Batch("two", sequences=2, new=3, context=15).values("cpu")
    assert values["block_tables"].tolist() == [[0, 1], [2, 3]]
    assert values["positions"].tolist() == [15, 16, 17] * 2
    assert values["slot_mapping"].tolist() == [15, 16, 17, 47, 48, 49]
    assert values["query_start"].tolist() == [0, 3, 6]
    assert values["logits_indices"].tolist() == [2, 5]
    assert values["seq_lens"].dtype == torch.int32


def test_gains_of_a_record_get_into_the_document(tmp_path: Path) -> None:
    batches = {"decode 1": {"gain, %": 3.21, "spread, %": 0.4}, "prefill 128": {"gain, %": -1.0, "spread, %": 0.5}}
    outcome = {
        "noise": {"model": "llama", **batches},
        "FuseAddNorm": {"model": "llama", **batches},
        "PageAttention": {"model": "llama", "needed": "tokens meet"},
        "SinkTransposes + CancelTransposes": {"model": "llama", **batches},
    }
    record = {
        "command": "python benchmarks/rules.py", "when": "2030-01-02T03:04:05", "hardware": {"cpu": "Some", "cores": 2},
        "versions": {"torch": "9.9"}, "results": {"layers": 2, "rules": outcome},
    }  # fmt: skip
    (tmp_path / "rules_cpu.json").write_text(json.dumps(record))
    document = tmp_path / "rules.md"
    document.write_text(f"before\n{rule_table.BEGIN}\nold\n{rule_table.END}\nafter\n")
    rule_table.put_table(document, tmp_path)
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert rows["FuseAddNorm"].endswith("| on, GPU | +3.2 · -1.0 % (llama) | – |")
    assert rows["PageAttention"].endswith("| on | needed | – |")
    assert rows["CancelTransposes"].endswith("| on | +3.2 · -1.0 % (llama, 2 rules together) | – |")
    assert rows["DropCasts"].endswith("| on | – | – |")
    assert any("decode 1 · prefill 128, 2 layers: Some, 2 cores, torch 9.9" in line for line in lines)
    assert any("noise +3.2 ± 0.4 · -1.0 ± 0.5 %" in line for line in lines)


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "rules.md"
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        rule_table.put_table(document, tmp_path)
