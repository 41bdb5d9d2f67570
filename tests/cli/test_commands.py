"""The command line on the bundled model, in processes of its own, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from enginery.checkpoint.checkpoint import Checkpoint
from enginery.cli.user_rules import load_rule
from enginery.engine.config import BuildConfig
from enginery.llm import BUNDLED_MODEL, cached_engine
from enginery.rewriting import PatternRewriter

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def enginery(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "enginery", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)


def test_run_answers_from_the_eager_backend() -> None:
    done = enginery("run", "--backend", "eager", "--json", "What is 17 + 25?")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"] == "42"
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])


def test_chat_keeps_the_conversation_and_resets() -> None:
    done = enginery(
        "chat", "--backend", "eager", stdin="What is 2 + 3?\n/reset\nReverse the word tiger\n/quit\nnever read\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["5", "regit"]


def test_inspect_reads_no_weight_and_says_what_fits() -> None:
    done = enginery("inspect", "--json", "--max-model-len", "512")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["facts"]["architecture"] == "LlamaForCausalLM"
    assert found["limits"]["max_model_len"] == 512
    assert found["bytes"]["total"] <= found["bytes"]["available"]


def test_explain_counts_rules_and_says_why_one_did_not_fire() -> None:
    phases = json.loads(enginery("explain", "--json").stdout)
    applied = {label: rule["rewritten"] for phase in phases for label, rule in phase["rules"].items()}
    assert applied["PageAttention"] == 8
    assert applied["MergeParallelLinears"] == 16
    one = enginery("explain", "PageAttention")
    assert "PageAttention tried 8, matched 8, applied 8" in one.stdout
    missed = enginery("explain", "PackTiedEmbedding", "--disable-rule", "PackLinears")
    assert missed.returncode == 0, missed.stderr
    assert "PackTiedEmbedding: the network has no enginery.pack_linear" in missed.stdout


def test_help_imports_no_torch() -> None:
    script = (
        "import sys; import enginery.cli.main; sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT)
    assert "doctor" in enginery("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "/no/such/model", "hi"), 3, "/no/such/model does not exist. Give a model directory"),
        (("run", "", "hi"), 3, "the name of the model is empty"),
        (("run", "~no-such-user/x", "hi"), 3, "~no-such-user/x does not exist"),
        (("run", "a long prompt " * 500, "model"), 3, "... does not exist. Give a model directory"),
        (("run", "--dtype", "int3", "hi"), 2, "dtype is 'int3'. Set --dtype to one of"),
        (("run", "--quantization", "int3", "hi"), 2, "quantization is 'int3'. Set --quantization to one of fp8"),
        (("run", "--backend", "magic", "hi"), 2, "backend is 'magic'. Set --backend to one of"),
        (("run", "--max-model-len", "lots", "hi"), 2, "--max-model-len 'lots' is not a count"),
        (("run", "--max-model-len", "99999", "hi"), 2, "Set --max-model-len to at most 1024"),
        (("run", "a", "b", "c"), 2, "Quote the prompt"),
        (("run", "--backend", "eager", "--temperature", "-1", "hi"), 2, "temperature"),
        (("run", "--backend", "eager", "--raw", "x " * 3000), 2, "maximum context length"),
        (("run", "--backend", "eager", "--kv-cache-memory", "1KiB", "hi"), 4, "--kv-cache-memory"),
        (("run", "--disable-rule", "PageAttentoin", "hi"), 2, "PageAttention"),
        (("run", "--rule", "nothing.py:Rule", "hi"), 2, "Give FILE.py:ClassName"),
        (("explain", "NoSuchRule"), 2, "no rule is named 'NoSuchRule'"),
        (("frobnicate",), 2, "No such command"),
        (("bench", "latency", "--batch-size", "0"), 2, "--batch-size 0 is out of range"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = enginery(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_a_request_that_fails_is_an_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "nan"
    shutil.copytree(BUNDLED_MODEL, checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.chmod(0o600)
    with weights.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(b"\xff" * 20_000)
    for arguments, place in (((), "stderr"), (("--json",), "stdout")):
        done = enginery("run", "--backend", "eager", *arguments, str(checkpoint), "hi")
        assert done.returncode == 5
        assert "the request failed: ArithmeticError: the model gave no finite logits" in getattr(done, place)


PRINTING = """
from enginery.cli import main, output

main.invoke = lambda arguments: {}
main.main([])
"""


@pytest.mark.parametrize(
    "printing", ["print('\u00d7' * 100_000)", "output.print_table('', ['\u00d7'], [['\u00d7' * 60]] * 1000)"]
)
def test_output_that_nobody_can_take_is_one_line(printing: str, tmp_path: Path) -> None:
    script = tmp_path / "printing.py"
    script.write_text(PRINTING.format(printing))

    def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", line.format(f"{sys.executable} {script}")]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=60)

    full = shell("{} > /dev/full")
    assert (full.returncode, full.stderr) == (4, "error: the output: No space left on device\n")
    for line in ("{} >&-", "{} | true; exit ${{PIPESTATUS[0]}}", "{} 2>&- >&- <&-"):
        done = shell(line)
        assert (done.returncode, done.stderr) == (0, ""), line
    ascii_only = shell("{}", PYTHONIOENCODING="ascii")
    assert (ascii_only.returncode, ascii_only.stderr) == (0, "")
    assert "?" in ascii_only.stdout


def test_a_build_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"ENGINERY_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "enginery", "build", "-o", str(tmp_path / "engine")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".engine.building-*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=120) == 143
    assert not list(tmp_path.glob(".engine.building-*"))
    assert not (tmp_path / "engine").exists()


def test_errors_are_json_for_machines() -> None:
    done = enginery("inspect", "--json", "/no/such/model")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["type"] == "CheckpointError"


def test_the_rule_of_the_readme_runs_on_the_real_path(tmp_path: Path) -> None:
    file = tmp_path / "my_rules.py"
    _, _, text = (Path(__file__).parents[2] / "README.md").read_text().partition("A rule of your own")
    file.write_text(text.split("```python\n")[1].split("```")[0])
    done = enginery("explain", "SiluByHand", "--rule", f"{file}:SiluByHand")
    assert done.returncode == 0, done.stderr
    assert "user rules: SiluByHand tried 8, matched 8, applied 8" in done.stdout
    answered = enginery("run", "--backend", "eager", "--rule", f"{file}:SiluByHand", "What is 17 + 25?")
    assert answered.stdout == "42\n"


class Scaled(PatternRewriter):
    def __init__(self, factor: object) -> None:
        self.factor = factor


def test_rules_of_other_attributes_are_other_engines() -> None:
    checkpoint = Checkpoint.open(BUNDLED_MODEL)
    places = [cached_engine(checkpoint, BuildConfig(rules=(Scaled(factor),))) for factor in (1, 1, 2, len, len)]
    assert places[0] == places[1]
    assert len(set(places)) == 4


def test_a_changed_rule_is_another_engine(tmp_path: Path) -> None:
    file = tmp_path / "rules_of_mine.py"
    checkpoint = Checkpoint.open(BUNDLED_MODEL)
    places = []
    for text in ("x", "x", "y"):
        file.write_text(
            f"from enginery.rewriting import PatternRewriter\n\n\nclass Mine(PatternRewriter):\n    {text} = 1\n"
        )
        config = BuildConfig(rules=(load_rule(f"{file}:Mine"),))
        places.append(cached_engine(checkpoint, config))
    assert places[0] == places[1] != places[2]
