"""The benchmark of linear layers on a GPU: what it times beside each other is one thing, and it runs to its end."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.kernels.triton_device import kernels_for_device

from .small import make_small

with kernels_for_device():
    import gpu_linears as benchmark

SMALL = {"qkv": (96, 64), "o": (64, 64), "gate_up": (128, 64), "down": (64, 64), "head": (80, 64)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, benchmark, PROJECTIONS=SMALL, ROWS=(1, 17), read_bandwidth=lambda: 4.0)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("case", ["linear", "norm_linear", "gated"])
def test_all_ways_compute_the_same(rows: int, float8: bool, case: str) -> None:
    weight = benchmark.new_weight(96, 64, float8)
    if case == "linear":
        ways = benchmark.linears(rows, 64, float8)
        ways.pop("cublas unscaled", None)
    else:
        ways = benchmark.norm_linears(rows, 64, float8, case == "gated")
    results = [way(*weight) for way in ways.values()]
    first, *others = (each[0] if isinstance(each, tuple) else each for each in results)
    assert len(others) >= 2
    part = 0.1 if float8 and rows == 1 else 0.02  # the operator does not round one row
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=part * float(first.abs().max()))


def test_a_comparison_has_a_row_for_each_shape() -> None:
    results = benchmark.compare(workers=1)
    assert len(results) == 2 * 2 * (len(SMALL) + len(benchmark.NORMED) + 1)
    assert all(value >= 0 for row in results.values() for value in row.values())


@pytest.mark.parametrize("kind", ["bf16", "float8", "norm"])
def test_tuning_runs_candidates_that_fit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [benchmark.candidates(kind, rows, 4096, gated=False) for rows in benchmark.TUNED_ROWS[kind]]
    for case in itertools.chain.from_iterable(everything):
        assert benchmark.shared_memory(case) <= 227 << 10
    assert all(len(cases) >= 10 for cases in everything)
    few = everything[0][:2]
    monkeypatch.setattr(benchmark, "candidates", lambda kind, rows, depth, gated: few)
    monkeypatch.setattr(benchmark, "TUNED_ROWS", {kind: (1,)})
    tuned = benchmark.tune(kind, workers=1)
    assert [len(row) for row in tuned.values()] == [2] * len(tuned)
