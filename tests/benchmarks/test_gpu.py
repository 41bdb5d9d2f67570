"""The GPU benchmark runs to its end on a tiny shape and a CPU, survives what fails, and its formulas are right."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.conftest import BENCHMARKS

import gpu
from decoder import tables
from decoder.profile import group_of, summarize
from decoder.protocol import GROUPS, TARGETS, TINY_SIZES, Sizes
from decoder.roofline import Ceilings, Roofline, Shape
from decoder.shapes import FULL, LLAMA_8B


def run(*arguments: str) -> tuple[dict[str, dict[str, Any]], str]:
    """(results by arm, the text behind them)"""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("arm"): line for line in lines}, done.stdout


def test_every_arm_of_the_engine_runs_and_is_kept(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    groups = "build,decode,context,prefill,mixed,steps,host,profile"
    options = ["--dtype", "bf16", "--only", groups, "--repeats", "1", "--engines", str(tmp_path)]
    results, text = run(*options, "--write", "--record", str(record))
    arms = [
        "build",
        "decode, batch 1",
        "decode, batch 4",
        "decode, context 40, batch 1",
        "prefill 16 × 2",
        "mixed",
        "mixed, as they came",
        "steps",
        "host",
    ]
    for arm in arms:  # a decoding step is the difference of two times, which may be anything in so small a model
        assert isinstance(results[f"enginery bf16 {arm}"].get("value"), float), results
    assert not [name for name, line in results.items() if "failed" in line or "skipped" in line], results
    kept = json.loads(record.read_text())
    assert kept["results"].keys() == results.keys()
    profile = kept["results"]["enginery bf16 profile, decode, batch 1"]
    assert {"linear", "norm, pointwise", "gaps"} <= profile["groups"].keys()
    assert profile["kernels"] == sorted(profile["kernels"], key=lambda kernel: -kernel["us"])
    assert profile["idle"]["largest"] == sorted(profile["idle"]["largest"], key=lambda gap: -gap["us"])
    assert profile["idle"]["us"] >= sum(gap["us"] for gap in profile["idle"]["largest"]) > 0
    steps = kept["results"]["enginery bf16 steps"]
    assert {"decode ≤ 32", "mixed ≤ 256"} == steps["kinds"].keys()
    # Every token of the load but the last of each request, which nobody computes further.
    load = TINY_SIZES.mixed()
    tokens = sum(length + count - 1 for length, count in load)
    assert sum(kind["tokens"] for kind in steps["kinds"].values()) == tokens
    assert 0 < steps["device, s"] < steps["value"]
    assert "bf16 decode, batch 4" in text.splitlines()[-1] + text
    assert "measured" in text
    assert "goal" not in text  # of the full shape alone
    markdown = tables.tables(kept)
    assert "| bf16, decode, batch 4 | ms/step |" in markdown
    assert "### enginery bf16 profile, prefill 16" in markdown
    assert "### enginery bf16 profile, prefill 40" in markdown
    assert "| idle after | before | times | µs |" in markdown
    assert "| decode ≤ 32 | " in markdown


def test_a_run_ends_in_time_and_says_what_it_left_out(tmp_path: Path) -> None:
    results, text = run("--dtype", "bf16", "--only", "decode,mixed", "--budget", "1", "--engines", str(tmp_path))
    assert results
    assert all("skipped" in line or "failed" in line for line in results.values())
    assert "tiny" in text.splitlines()[-len(results) - 2]


WORKER = """
import json, os, signal, sys
job = json.loads(sys.argv[2])
send = lambda message: os.write(job["pipe"], (json.dumps(message) + "\\n").encode())
if job["engine"] == "vllm":
    sys.exit(7)
for name in job["names"]:
    send({"begin": name})
    if name == "decode, batch 4":
        os.kill(os.getpid(), signal.SIGSEGV)
    send({"arm": name, "value": len(job["names"])})
send({"end": True})
"""


def test_a_process_that_dies_costs_one_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu, "__file__", str(worker))
    options = gpu.parse(["--tiny", "--device", "cpu", "--dtype", "bf16", "--only", "decode,prefill,vllm"])
    results = dict(gpu.measure(options))
    assert results["enginery bf16 decode, batch 1"]["value"] == 4
    assert results["enginery bf16 decode, batch 4"]["failed"] == "the process ended with SIGSEGV"
    assert results["enginery bf16 prefill 16 × 2"]["value"] == 2  # of a second process, with what was left
    assert results["vllm bf16 open"]["failed"] == "the process ended with exit code 7"
    assert len(results) == 5


# Formulas


def test_limits_of_the_full_shape() -> None:
    """15.0 GB of weights at 4.27 TB/s, 128 KiB of KV a token, 700 TFLOP/s: figures that were computed by hand."""
    wide, narrow = (Roofline(Shape.of(LLAMA_8B), Ceilings(), fp8) for fp8 in (False, True))
    assert wide.weight_bytes == pytest.approx(15.0e9, rel=1e-3)
    assert narrow.weight_bytes == pytest.approx(8.03e9, rel=1e-3)
    for roof, batch, context, milliseconds in [
        (wide, 1, 192, 3.5), (wide, 32, 192, 3.7), (wide, 128, 192, 4.3), (wide, 256, 192, 7.0),
        (wide, 1, 8224, 3.8), (wide, 16, 8224, 7.6),
        (narrow, 1, 192, 1.9), (narrow, 32, 192, 2.1), (narrow, 256, 192, 4.4),
    ]:  # fmt: skip
        assert 1e3 * roof.decode(batch, context) == pytest.approx(milliseconds, abs=0.06)
    assert 1e3 * wide.prefill(8192) == pytest.approx(190, rel=0.02)


def test_limits_only_grow() -> None:
    generator = random.Random(5)
    roof = Roofline(Shape.of(LLAMA_8B), Ceilings())
    for _ in range(200):
        batch, context, length = generator.randint(1, 512), generator.randint(1, 10000), generator.randint(1, 8000)
        assert roof.decode(batch, context) < roof.decode(batch + 1, context + 1)
        assert roof.prefill(length) < roof.prefill(length + 1)
        assert roof.prefill(length, 2) == pytest.approx(2 * roof.prefill(length))
        assert roof.load([(length, 9)]) > roof.prefill(length)


def test_the_mixed_load_is_the_published_one() -> None:
    requests = Sizes().mixed()
    assert (sum(i for i, _ in requests), sum(o for _, o in requests)) == (230_953, 187_943)


def test_every_target_is_an_arm() -> None:
    names = {arm.name for group in GROUPS for arm in Sizes().arms(group)}
    assert {name for _, name in TARGETS} <= names


def test_a_profile_counts_overlapping_kernels_once() -> None:
    spans = [
        ("nvjet_tst_64x8", 0.0, 10.0),
        ("attend_short", 8.0, 14.0),
        ("nvjet_tst_64x8", 20.0, 30.0),
        ("x", 21.0, 22.0),
    ]
    profile = summarize(spans, 2)
    assert profile.busy_us == 12.0
    first = profile.kernels[0]
    assert (first.name, first.count, first.us) == ("nvjet_tst_64x8", 1.0, 10.0)
    groups = profile.to_json(step_us=20.0)["groups"]
    assert groups["gaps"]["us"] == 8.0
    assert groups["attention"]["share"] == 0.15


INPUTS, TOKENS = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"
TWO_STEPS = [
    (INPUTS, 0.0, 2.0), ("product", 5.0, 15.0), ("side", 6.0, 8.0), ("norm", 16.0, 18.0), ("product", 20.0, 30.0),
    (TOKENS, 30.0, 31.0),
    (INPUTS, 45.0, 47.0), ("product", 48.0, 60.0), ("side", 52.0, 54.0), ("norm", 61.0, 63.0), ("product", 69.0, 79.0),
    (TOKENS, 79.0, 80.0),
]  # fmt: skip


def test_idle_time_is_told_by_the_kernels_around_it_and_apart_between_steps() -> None:
    profile = summarize(reversed(TWO_STEPS), 2)
    gaps = [(gap.before, gap.after, gap.count, gap.us) for gap in profile.gaps]
    assert gaps == [("norm", "product", 1.0, 4.0), (INPUTS, "product", 1.0, 2.0), ("product", "norm", 1.0, 1.0)]
    assert profile.borders == [14.0]
    idle = profile.to_json(step_us=40.0)["idle"]
    assert (idle["count"], idle["us"], idle["borders"]) == (3.0, 7.0, {"count": 1, "us each": 14.0})
    assert idle["largest"][0] == {"before": "norm", "after": "product", "count": 1.0, "us": 4.0}
    assert profile.busy_us + idle["us"] == pytest.approx((80.0 - 14.0) / 2)


def test_the_tables_of_a_profile() -> None:
    line = {"value": 0.04, "unit": "ms/step", **summarize(TWO_STEPS, 2).to_json(step_us=40.0)}
    markdown = tables.tables(record_of({"enginery bf16 profile, decode, batch 1": line}))
    assert markdown.endswith(
        f"""\
| `norm` | other | 1 | 2 | 5.0 % |
| `{TOKENS}` | copies | 1 | 1 | 2.5 % |

Idle under the profiler: 7 µs in 3 places of a step; between steps 14 µs each, 1 seen.

| idle after | before | times | µs |
| --- | --- | --- | --- |
| `norm` | `product` | 1 | 4 |
| `{INPUTS}` | `product` | 1 | 2 |
| `product` | `norm` | 1 | 1 |"""
    )


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_192x8_64x8_4x1_v_bz_TNN", "linear"),
        ("linear_rows", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "linear"),
        ("attend_long", "attention"),
        ("merge_splits", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_poi_fused__to_copy_add_mul_3", "norm, pointwise"),
        ("triton_red_fused__to_copy_mean_rsqrt_1", "norm, pointwise"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
            "sampling",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "norm, pointwise"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_are_for(name: str, group: str) -> None:
    assert group_of(name) == group


# Tables


def record_of(results: dict[str, dict[str, Any]], shape: str = FULL) -> dict[str, Any]:
    hardware = {"cpu": "a processor", "gpu": "a GPU", "driver": "1.2"}
    return {"hardware": hardware, "versions": {"torch": "9.9"}, "shape": shape, "results": results}


def test_a_table_compares_with_goal_and_limit() -> None:
    results = {
        "enginery bf16 decode, batch 1": {"value": 4.0, "unit": "ms/step", "when": "2030-01-02T"},
        "enginery bf16 mixed": {"value": 9000.0, "unit": "output tokens/s", "when": "2030-01-03T"},
        "enginery bf16 prefill 1024 × 1": {"failed": "RuntimeError: no | such kernel"},
        "transformers bf16 decode, batch 1": {"value": 25.0, "unit": "ms/step"},
    }
    rows = {row["arm"]: row for row in tables.figures(record_of(results))}
    decode, mixed = rows["decode, batch 1"], rows["mixed"]
    assert (decode["measured"], decode["goal"], decode["reached"], decode["transformers"]) == (
        "4.00",
        "4.10",
        "yes",
        "25.00",
    )
    assert decode["of the limit"] == "88 %"
    assert (mixed["measured"], mixed["reached"]) == ("9,000", "no")
    assert rows["prefill 1024 × 1"]["measured"] == "failed"
    markdown = tables.tables(record_of(results))
    assert "a GPU, driver 1.2, torch 9.9, measured 2030-01-02 to 2030-01-03." in markdown
    assert all(row["goal"] == "" for row in tables.figures(record_of(results, "tiny")))


def test_another_gpu_has_a_column_of_its_own() -> None:
    decode = "enginery bf16 decode, batch 1"
    record = record_of({decode: {"value": 4.0, "unit": "ms/step"}})
    assert "another GPU" not in tables.show(record)
    record["another"] = {decode: {"value": 4.5, "unit": "ms/step"}}
    assert "| bf16, decode, batch 1 | ms/step | 4.00 | 4.50 | 3.52 |" in tables.tables(record)


def test_measured_ceilings_move_the_limits() -> None:
    results = {
        "enginery bf16 ceilings": {"value": 2.0, "unit": "TB/s", "read": 2e12, "bf16": 500e12},
        "enginery bf16 decode, batch 1": {"value": 9.0, "unit": "ms/step"},
    }
    (row,) = (row for row in tables.figures(record_of(results)) if row["arm"] == "decode, batch 1")
    assert float(row["limit"]) == pytest.approx(15.01 / 2 + 0.0126, abs=0.01)


def test_tables_are_put_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for text in ("one", "two"):
        tables.put_into(document, text)
    assert document.read_text() == f"before\n{tables.BEGIN}\n\ntwo\n\n{tables.END}\nafter\n"
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        tables.put_into(document, "one")


def test_the_document_shows_the_record() -> None:
    record = BENCHMARKS / "results" / "gpu.json"
    if not record.is_file():
        pytest.skip("nothing was measured on a GPU yet")
    document = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    expected = tables.tables(json.loads(record.read_text()))
    assert expected in document, "run: python benchmarks/gpu.py --markdown docs/performance.md"
