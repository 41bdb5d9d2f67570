"""The benchmark of attention on a GPU: its batches are right, and it runs to its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from tests.kernels.triton_device import kernels_for_device

from enginery.ops.paged_attention import paged_attention_reference

from .small import make_small

with kernels_for_device():
    import gpu_kernels as benchmark


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's attention is not what is tested."""
    make_small(
        monkeypatch,
        benchmark,
        HEADS=4,
        KV_HEADS=2,
        HEAD=16,
        DECODE=((2, 20),),
        DECODE_SPLITS={(2, 20): (2,)},
        RAGGED=(3,),
        PREFILL=((24, 0), (9, 20)),
        sdpa_decode=lambda sequences, context, backend: 1e-6,
        sdpa_prefill=lambda tokens, backend: 1e-6,
        compare_layers=dict,
    )


def test_ragged_lengths_are_those_that_the_kernels_were_tuned_on() -> None:
    """The docstring of `plan_splits` cites them."""
    lengths = benchmark.ragged(248)
    assert (len(lengths), sum(lengths) // 248, max(lengths)) == (248, 343, 2138)
    assert benchmark.ragged(248) == lengths


@pytest.mark.parametrize(
    ("lengths", "columns"), [([512], 32), ([513], 128), ([20, 2200], 512), ([20] * 32, 32), ([20] * 33, 512)]
)
def test_tables_are_as_wide_as_in_the_engine(lengths: list[int], columns: int) -> None:
    batch = benchmark.Batch.random(lengths, 1, 1)
    assert batch.metadata[1].shape == (len(lengths), columns)


@pytest.mark.parametrize(("lengths", "new"), [([40, 16, 33], 1), ([24], 24), ([20, 35], 3)])
def test_a_batch_is_what_it_says(lengths: list[int], new: int) -> None:
    batch = benchmark.Batch.random(lengths, new, 1)
    slots, tables, start, seq_lens = batch.metadata
    assert seq_lens.tolist() == lengths
    assert start.diff().tolist() == [new] * len(lengths)
    used = [table[: -(-length // 16)].tolist() for table, length in zip(tables, lengths, strict=True)]
    assert sorted(itertools.chain.from_iterable(used)) == list(range(len(batch.pools[0][0])))
    places = [length - new + i for length in lengths for i in range(new)]
    owner = [sequence for sequence in range(len(lengths)) for _ in range(new)]
    assert slots.tolist() == [used[o][p // 16] * 16 + p % 16 for o, p in zip(owner, places, strict=True)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_split_and_the_plan_agree_with_the_reference() -> None:
    lengths = [70, 200, 20]
    batch = benchmark.Batch.random(lengths, 1, 1)
    heads = (batch.query, batch.key, batch.value)
    wide = [tensor.double() for tensor in (*heads, *batch.pools[0])]
    expected = paged_attention_reference(*wide, *batch.metadata, benchmark.SCALE)
    for splits, share in ((1, 1), (4, 2)):
        plan = replace(benchmark.default_plan(lengths), splits=splits, share=share)
        found = batch.calls(plan)[0]().double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_measurement_has_a_row_for_each_batch() -> None:
    results = benchmark.measure(4.0)
    decode = ["decode 2 x 20", "decode 3 x 198 on average"]
    assert [name.split(",")[0] for name in results] == [*decode, "prefill 24", "prefill 9 after 20"]
    assert results["decode 2 x 20, TB/s"].keys() == {"enginery", "attend_short", "cudnn (dense)", "flash (dense)"}
    assert results["prefill 24, TFLOP/s"].keys() == {"enginery", "attend_long", "cudnn (dense)", "flash (dense)"}
    assert results["prefill 9 after 20, TFLOP/s"].keys() == {"enginery", "attend_long"}
    ragged = next(row for name, row in results.items() if "average" in name)
    keys = sum(benchmark.ragged(3))
    least = pytest.approx(keys * 2 * 16 * 4 / 4e12 * 1e6)
    assert ragged == {"enginery": 1.0, "attend_short": 1.0, "one split": 1.0, "least": least}


def test_general_kernels_are_timed_beside_those_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int | None] = []

    def note(self: benchmark.Batch, plans: Iterable, **_: bool) -> benchmark.Times:
        plans = list(plans)
        timed.extend(plan and plan.hopper_programs for plan in plans)
        return dict.fromkeys(plans, 1e-6)

    on_hopper(monkeypatch)
    monkeypatch.setattr(benchmark.Batch, "times", note)
    benchmark.measure(4.0)
    # Decoding: of one length, and ragged, also in one piece. Two prompts.
    assert timed == [None, 0, None, 132, 0, None, 0, None, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tuning_keeps_six_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    few = benchmark.ragged_candidates([100])[:3]
    monkeypatch.setattr(benchmark, "ragged_candidates", lambda lengths: few)
    tuned = benchmark.tune(1, ("decode",))
    assert [len(row) for row in tuned.values()] == [6, 3]


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    default_plan = benchmark.default_plan
    monkeypatch.setattr(benchmark, "default_plan", lambda *args: replace(default_plan(*args), hopper_programs=132))


def test_both_kernels_of_prompts_are_candidates_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch)
    names = [benchmark.shown(candidate) for candidate in benchmark.prefill_candidates()]
    assert names[0] == "attend_prompts"
    assert all(name.startswith("Tiling(") for name in names[1:])
    assert len(set(names)) == len(names) == 13


def test_both_kernels_of_decoding_are_candidates_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of both, tiles of the general one alone."""
    general = [benchmark.shown(candidate) for candidate in benchmark.ragged_candidates([100])]
    tiles = [benchmark.shown(candidate) for candidate in benchmark.decode_candidates((1, 2))]
    assert len(general) == 17
    assert all(name.startswith("Tiling(") for name in [*general, *tiles])
    on_hopper(monkeypatch)
    names = [benchmark.shown(candidate) for candidate in benchmark.ragged_candidates([100])]
    assert names[0] == "attend_few, 1 splits of 1 blocks"
    assert all(name.startswith("attend_few, ") for name in names[:17])
    assert names[17:] == general
    assert len(set(names)) == 34
    assert [benchmark.shown(candidate) for candidate in benchmark.decode_candidates((1, 2))] == tiles
