"""`enginery explain` on a small checkpoint of a model that is not ours: phases, a rule, two configurations, a page."""

from __future__ import annotations

import json
import os
import stat
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from enginery.checkpoint.checkpoint import Checkpoint
from enginery.cli.explain import split_words
from enginery.cli.main import main
from enginery.engine.config import BuildConfig
from enginery.errors import UsageError
from enginery.frontends.huggingface import Imported
from enginery.llm import import_network as llm_import
from enginery.network import Network
from enginery.rewriting.alike import alike, ranges


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-phi"
    transformers.Phi3ForCausalLM(config).save_pretrained(directory)
    return str(directory)


@cache
def imported(directory: Path, dtype: torch.dtype | None) -> Imported:
    return llm_import(Checkpoint.open(directory), BuildConfig(dtype=str(dtype or "auto").removeprefix("torch.")))


def copy_of_import(checkpoint: Checkpoint, config: BuildConfig) -> Imported:
    found = imported(checkpoint.directory, config.torch_dtype)
    return replace(found, network=found.network.copy())


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The command, in this process; a checkpoint is exported once."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("enginery.llm.import_network", copy_of_import)

    def run(*words: str) -> Done:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            main(["explain", *words])
        return Done(stopped.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return run


def test_phases_are_a_table(phi: str, explain) -> None:
    done = explain(phi)
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["phase,", "rule", "applied", "ms", "layers"]
    assert "PageAttention" in done.out
    assert done.err == ""


def test_a_rule_is_shown_once_for_repeated_layers(phi: str, explain) -> None:
    done = explain(phi, "PageAttention")
    assert "paged attention: PageAttention tried 2, matched 2, applied 2 (" in done.out
    assert "  model.layers.0, and alike in model.layers.1\n" in done.out
    assert "    self_attn.attention  →  self_attn.paged_attention\n" in done.out


def test_a_rule_that_did_not_fire_names_the_line_that_declined(phi: str, explain) -> None:
    done = explain(phi, "MergeParallelLinears")
    assert "matched 0, applied 0" in done.out
    miss = "MergeParallelLinears: nearest miss at model.layers.0.self_attn.qkv_proj.linear: its code declines by `if "
    assert miss in done.out
    assert "(merge_parallel_linears.py:" in done.out
    found = json.loads(explain(phi, "MergeParallelLinears", "--json").out)
    assert found["nearest_miss"]["layer"] == "model.layers.0.self_attn.qkv_proj.linear"
    assert found["phases"][0]["rewritten"] == 0


def test_a_rule_that_is_off_by_default_is_shown_as_if_it_were_on(phi: str, explain) -> None:
    done = explain(phi, "FuseAddNorm")
    assert done.err == "note: FuseAddNorm is off by default; this is what it would do\n"
    assert "FuseAddNorm tried " in done.out


def test_a_rule_that_is_switched_off(phi: str, explain) -> None:
    done = explain(phi, "MergeReshapes", "--disable-rule", "MergeReshapes")
    assert done.out.startswith("MergeReshapes is not among the rules of this configuration: switched off")


def test_a_network_that_no_engine_runs_is_explained_all_the_same(phi: str, explain) -> None:
    done = explain(phi, "--disable-rule", "PageAttention")
    assert done.code == 0
    assert "MergeReshapes" in done.out
    assert done.err.startswith("warning: no engine can run this network: layer model.layers.0.self_attn.attention ")
    assert len(done.err.splitlines()) == 1


def test_two_configurations_differ_by_phase_by_rule_and_by_layer(phi: str, explain) -> None:
    done = explain(phi, "--diff", "--disable-rule", "PackLinears")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["└", "PackLinears", "9", "→", "none"] in rows
    assert "model.layers.0, and alike in model.layers.1" in done.out
    assert "\n- %self_attn.o_proj.packed_linear: float32[1, tokens, 32] = enginery.packed_linear(" in done.out
    assert "\n+ %self_attn.o_proj.linear: float32[1, tokens, 32] = aten.linear(" in done.out
    found = json.loads(explain(phi, "--diff", "--disable-rule", "PackLinears", "--json").out)
    pack = next(phase for phase in found["phases"] if phase["phase"] == "pack")
    assert pack["rules"]["PackLinears"]["rewritten"] == [9, None]
    assert any("enginery.pack_linear(" in line for line in found["network"]["removed"])
    assert not any("enginery.pack_linear(" in line for line in found["network"]["added"])


def test_one_setting_can_be_compared_within_another(phi: str, explain) -> None:
    same = ("--dtype", "bfloat16", "--disable-rule", "PackLinears")
    done = explain(phi, *same, "--against", "--dtype bfloat16 --disable-rule PackLinears")
    assert done.out == "no difference\n"
    done = explain(phi, *same, "--against", "--dtype bfloat16")
    assert "PackLinears" in done.out
    assert "float32[tokens, 64]" not in done.out


def test_the_page_is_one_file_that_replaces_the_old_one(phi: str, explain, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    done = explain(phi, "--html", str(file))
    assert done == (0, f"{file}\n", "")
    text = file.read_text()
    assert text.startswith("<!doctype html>")
    assert "<title>tiny-phi: rewriting</title>" in text
    assert '"blocks":["model.layers.0","model.layers.1"]' in text
    assert list(tmp_path.iterdir()) == [file]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert explain(phi, "PackLinears", "--html", str(file)).out == f"{file}#q=PackLinears\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--html", "/no/such/folder/p.html"],
            "--html /no/such/folder/p.html: /no/such/folder is no directory. Make it",
        ),
        (["--html", "/proc/p.html"], "--html /proc/p.html: "),
        (["PageAttentoin"], "no rule is named 'PageAttentoin'. Near: PageAttention"),
        (["--against", "--max-model-len lots"], "--max-model-len 'lots' is not a count"),
        (["--against", "--frobnicate"], "No such option: --frobnicate"),
        (["--against", "--dtype 'float32"], '--against "--dtype \'float32": No closing quotation'),
        (["--against", "--help"], "No such option: --help"),
        (["A", "B"], "3 arguments given. enginery explain [MODEL] [RULE]"),
    ],
)
def test_mistakes_are_one_line(phi: str, explain, words: list[str], line: str) -> None:
    done = explain(phi, *words)
    assert done.code == 2
    assert done.err.startswith(f"error: {line}")
    assert len(done.err.splitlines()) == 1
    assert done.out == ""


RULES = """
import sys
import torch
from enginery.rewriting import PatternRewriter, Var


class Silu(PatternRewriter):
    pattern = torch.nn.functional.silu(Var("x"))


class Unready(Silu):
    def __init__(self):
        raise RuntimeError("boom\\nsecond line")


class Asks(Silu):
    def __init__(self, heads):
        pass


class Leaves(Silu):
    def __init__(self):
        sys.exit(7)


class Plain:
    pass


class Five(PatternRewriter):
    pattern = 5


class LeavesLater(Silu):
    def rewrite(self, x):
        sys.exit(7)
"""


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("Unready", 2, "--rule {}:Unready: Unready() raised RuntimeError: boom. A rule is made without arguments"),
        ("Asks", 2, "--rule {}:Asks: Asks() raised TypeError: Asks.__init__() missing 1 required "),
        ("Leaves", 2, "--rule {}:Leaves: Leaves() raised SystemExit: 7. A rule is made without arguments"),
        ("Plain", 2, "--rule {}:Plain is no rule. Derive it from enginery.rewriting.PatternRewriter"),
        ("Five", 5, "rule Five: its pattern is no pattern ("),
        ("LeavesLater", 5, "rule LeavesLater raised SystemExit: 7 (at layer model.layers.0."),
    ],
)
def test_a_mistake_in_a_rule_is_one_line(phi: str, explain, tmp_path: Path, name: str, code: int, line: str) -> None:
    file = tmp_path / "mistakes.py"
    file.write_text(RULES)
    done = explain(phi, "--rule", f"{file}:{name}")
    assert done.err.startswith(f"error: {line.format(file)}")
    assert len(done.err.splitlines()) == 1
    assert done.code == code


def test_a_file_of_rules_that_leaves_says_so(phi: str, explain, tmp_path: Path) -> None:
    file = tmp_path / "leaves.py"
    file.write_text("import sys\nsys.exit(4)\n")
    done = explain(phi, "--rule", f"{file}:Any")
    assert done == (2, "", f"error: --rule {file} does not load (SystemExit: 4). Try `python {file}`\n")


def test_a_network_is_no_json(phi: str, explain) -> None:
    done = explain(phi, "--text", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["message"] == "--text prints a network, --json the report. Give one of them"


def test_an_engine_has_been_rewritten_already(explain, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    done = explain(str(tmp_path))
    assert done.code == 2
    assert f"{tmp_path} is an engine: its phases have run. Give the checkpoint" in done.err


def test_a_single_word_is_a_rule_or_a_model() -> None:
    assert split_words(["PageAttention"], ()) == (None, "PageAttention")
    assert split_words(["gpt2"], ()) == ("gpt2", None)
    assert split_words(["org/name", "DeadCode"], ()) == ("org/name", "DeadCode")
    assert split_words([], ()) == (None, None)
    with pytest.raises(UsageError, match="no rule is named 'Unheard'"):
        split_words(["Unheard"], ())


def test_equal_blocks_are_said_once() -> None:
    lines = [(f"h.{n}.mlp", f"h.{n}.mlp.up reads h.{max(n - 1, 0)}.out and cache.{n}") for n in range(4)]
    lines += [("h.5.mlp", "another"), ("norm", "outside")]
    first, rest, other, outside = alike(lines)
    assert first.title() == "h.0"
    assert (rest.title(), rest.lines) == ("h.1, and alike in h.2-3", ("h.1.mlp.up reads h.0.out and cache.1",))
    assert other.numbers == (5,)
    assert (outside.title(), outside.lines) == ("", ("outside",))
    assert ranges([7, 1, 2, 3]) == "1-3, 7"


def test_the_text_option_prints_a_network(phi: str, explain) -> None:
    Network.parse(explain(phi, "--text").out).verify()
