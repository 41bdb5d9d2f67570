"""ENGINERY_DEBUG and ENGINERY_DUMP: each phase as lines, as text that parses, and as Python that computes the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from enginery.errors import UsageError
from enginery.network import Network
from enginery.rewriting.numerics import sample_values
from enginery.rewriting.pipeline import PHASES, PipelineConfig, apply_phases, nearest_miss, run_phases

DECODER = """network 1
input %token_ids: int64[tokens]
input %positions: int64[tokens]
constant %embed: float32[40, 8]
constant %frequencies: float32[8]
constant %wq: float32[8, 8]
constant %wk: float32[4, 8]
constant %wv: float32[4, 8]
constant %head: float32[40, 8]
%e: float32[tokens, 8] = aten.embedding(%embed, %token_ids)
%p: int64[tokens, 1] = aten.unsqueeze(%positions, 1)
%r: float32[tokens, 8] = aten.mul.Tensor(%p, %frequencies)
%c: float32[tokens, 8] = aten.cos(%r)
%x: float32[tokens, 8] = aten.add.Tensor(%e, %c)
%q: float32[tokens, 8] = aten.linear(%x, %wq)
%k: float32[tokens, 4] = aten.linear(%x, %wk)
%v: float32[tokens, 4] = aten.linear(%x, %wv)
%q2: float32[tokens, 2, 4] = aten.view(%q, [tokens, 2, 4])
%k2: float32[tokens, 1, 4] = aten.view(%k, [tokens, 1, 4])
%v2: float32[tokens, 1, 4] = aten.view(%v, [tokens, 1, 4])
%a: float32[tokens, 2, 4] = enginery.attention(%q2, %k2, %v2, 0.5)
%a2: float32[tokens, 8] = aten.reshape(%a, [tokens, 8])
%s: float32[tokens, 8] = aten.silu(%a2)
%y: float32[tokens, 8] = aten.add.Tensor(%x, %s)
%logits: float32[tokens, 40] = aten.linear(%y, %head)
output logits = %logits
"""
TOKENS = 5
STEP = {
    "token_ids": torch.tensor([3, 1, 4, 1, 5]),
    "positions": torch.arange(TOKENS),
    "slot_mapping": torch.arange(TOKENS),
    "block_tables": torch.zeros(1, 1, dtype=torch.int32),
    "query_start": torch.tensor([0, TOKENS], dtype=torch.int32),
    "seq_lens": torch.tensor([TOKENS], dtype=torch.int32),
    "logits_indices": torch.tensor([0, TOKENS - 1]),
}
"""one sequence that fills part of one block"""


def decoder() -> Network:
    network = Network.parse(DECODER)
    network.values["frequencies"] = torch.rand(8, generator=torch.Generator().manual_seed(1))
    return network


def inputs_of(network: Network) -> list[torch.Tensor]:
    return [STEP[t.name] if t.name in STEP else torch.zeros(2, *t.shape[1:], dtype=t.dtype) for t in network.inputs]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dumped", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINERY_DUMP", str(tmp_path / "deep" / "dump"))
    return tmp_path / "deep" / "dump"


def test_every_phase_is_dumped_as_text_and_as_python_that_computes_the_same(dump: Path) -> None:
    network = decoder()
    weights = sample_values(network).constants
    apply_phases(network)
    names = ["imported", *(phase.name.replace(" ", "-") for phase in PHASES if phase.wanted(PipelineConfig()))]
    stems = [f"{number}-{name}" for number, name in enumerate(names)]
    assert {path.name for path in dump.iterdir()} == {
        "values.safetensors", *(f"{stem}.{kind}" for stem in stems for kind in ("txt", "py")),
    }  # fmt: skip
    constants = {**weights, **load_file(dump / "values.safetensors")}
    (logits,) = decoder().run(inputs_of(decoder()), weights)
    for stem in stems:
        dumped = Network.parse((dump / f"{stem}.txt").read_text())
        (expected,) = dumped.run(inputs_of(dumped), {t.name: constants[t.name] for t in dumped.constants})
        (found,) = load(dump / f"{stem}.py").network(*inputs_of(dumped), constants)
        assert torch.equal(found, expected), stem
        wanted = logits if len(found) == TOKENS else logits[STEP["logits_indices"]]
        torch.testing.assert_close(found, wanted)
    assert len(found) == 2


def test_levels_of_debug_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for level in range(6):
        monkeypatch.setenv("ENGINERY_DEBUG", str(level))
        apply_phases(decoder())
        captured = capsys.readouterr()
        assert captured.out == ""
        said.append(captured.err)
    assert said[0] == ""
    assert said[1].startswith("imported: 16 layers\ncanonicalise: 16 layers -> 16 in ")
    assert "(ViewToReshape 3)" in said[1]
    marks = ("MergeParallelLinears: q + k + v", "declined 1: ", "network 1\n", "def network(")
    for level, mark in enumerate(marks, start=2):
        assert mark not in said[level - 1]
        assert all(mark in text for text in said[level:])


@pytest.mark.parametrize("value", ["6", "-1"])
def test_a_level_that_there_is_not(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_DEBUG", value)
    with pytest.raises(UsageError, match=f"ENGINERY_DEBUG='{value}' is no whole number from 0 to 5"):
        run_phases(decoder())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGINERY_DUMP", str(tmp_path / "file" / "dump"))
    with pytest.raises(UsageError, match=r"ENGINERY_DUMP: .*file/dump: Not a directory. Give a directory") as caught:
        run_phases(decoder())
    assert "\n" not in str(caught.value)


def test_looking_for_a_nearest_miss_dumps_nothing(dump: Path) -> None:
    assert nearest_miss(decoder(), "ExpandBaddbmm") is not None
    assert not dump.exists()
