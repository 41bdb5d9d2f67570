"""`enginery bench` on the bundled model: what it counts, and that its warm-up is no part of it."""

from __future__ import annotations

import json

import pytest
import torch

from enginery.cli.bench import Load
from enginery.cli.main import main
from enginery.llm import LLM

EAGER = ("--backend", "eager", "--device", "cpu", "--kv-cache-memory", "64MiB", "--json")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments, *EAGER])
    assert stop.value.code == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_latency_gives_time_to_first_token_and_time_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    values = bench(capsys, "latency", "--batch-size", "2", "--input-len", "8", "--output-len", "5", "--repeats", "1")
    assert values["time to first token, ms"] > 0
    assert values["input tokens/s"] == pytest.approx(2 * 8 / (1e-3 * values["time to first token, ms"]))
    if values["per step, ms"] > 0:  # a difference of two runs
        assert values["output tokens/s"] == pytest.approx(2 / (1e-3 * values["per step, ms"]))
    assert values["steps"] >= 5 + 1 + 5  # warm-up, one token, all tokens


def test_one_token_has_no_step_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert "per step, ms" not in bench(capsys, "latency", "--output-len", "1", "--repeats", "1")


def test_throughput_counts_the_tokens_of_the_load_alone(capsys: pytest.CaptureFixture[str]) -> None:
    values = bench(capsys, "throughput", "--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--spread", "0")
    assert values["output tokens/s"] * values["total, s"] == pytest.approx(3 * 4)
    assert values["input tokens/s"] * values["total, s"] == pytest.approx(3 * 8)


def test_a_load_runs_to_its_lengths() -> None:
    with LLM(backend="eager", device="cpu", dtype="float32", kv_cache_memory=64 << 20) as llm:
        outputs, seconds = Load([5, 9], [3, 1]).run(llm)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 1]
    assert [len(output.prompt_token_ids) for output in outputs] == [5, 9]
    assert seconds > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [("bench", "latency"), ("run", "hi"), ("inspect",), ("build", "-o", "nowhere")])
def test_cuda_without_a_gpu_is_one_line_with_the_fix(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--device", "cuda"])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: torch finds no CUDA device")
    assert line.endswith("or use --device cpu")
