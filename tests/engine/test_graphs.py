"""Padded steps: the one buffer they lie in, and that padding changes no result. On a GPU also:
replayed graphs equal launched kernels, whatever came before."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import EAGER
from tests.engine.decoder import Batcher, Decoder, Imported, imported, random_tokens, reader

from enginery.engine.builder import build
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.engine.graphs import GraphedStep, LaunchedStep, empty_step
from enginery.engine.inputs import InputBuffer, StepShape, gathered
from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.errors import StepError

LIMITS = EngineLimits(1000, 4096, 2048, 256, 500)


def random_inputs(rng: np.random.Generator, sampled: bool) -> StepInputs:
    counts = rng.integers(1, 5, rng.integers(1, 6))
    start = np.array([0, *np.cumsum(counts)], np.int32)
    tokens = int(start[-1])
    return StepInputs(
        token_ids=rng.integers(0, 1000, tokens),
        positions=rng.integers(0, 4096, tokens),
        slot_mapping=rng.integers(0, 8000, tokens),
        block_tables=rng.integers(0, 500, (len(counts), 7)).astype(np.int32),
        query_start=start,
        seq_lens=rng.integers(1, 100, len(counts)).astype(np.int32),
        logits_indices=start[1:].astype(np.int64) - 1,
        sampled=torch.from_numpy(rng.integers(0, 1000, 9)) if sampled else None,
        sources=rng.integers(-1, 9, tokens) if sampled else None,
    )


@pytest.mark.parametrize("seed", range(6))
def test_what_is_sent_arrives_padded(seed: int) -> None:
    """In the same buffer as the steps before it, of any size."""
    rng = np.random.default_rng(seed)
    buffer = InputBuffer(LIMITS, torch.device("cpu"))
    for round in range(8):
        inputs = random_inputs(rng, sampled=round % 2 == 1)
        exact = StepShape.of(inputs)
        shape = exact if round % 3 == 0 else StepShape(exact.tokens + 11, exact.sequences + 4, 32, exact.logits + 4)
        buffer.send(inputs, shape)
        values = {name: value.numpy() for name, value in gathered(buffer.views(shape)).items()}
        known = inputs.resolved()
        tokens, sequences = exact.tokens, exact.sequences
        for name in ("token_ids", "positions", "slot_mapping"):
            np.testing.assert_array_equal(values[name][:tokens], getattr(known, name))
        assert (values["slot_mapping"][tokens:] == -1).all()
        np.testing.assert_array_equal(values["block_tables"][:sequences, :7], known.block_tables)
        np.testing.assert_array_equal(values["query_start"][: sequences + 1], known.query_start)
        assert (values["query_start"][sequences:] == tokens).all()
        np.testing.assert_array_equal(values["seq_lens"][:sequences], known.seq_lens)
        np.testing.assert_array_equal(values["logits_indices"][: exact.logits], known.logits_indices)
        views = buffer.views(shape)
        assert all((view.data_ptr() - views["known"].data_ptr()) % 256 == 0 for view in views.values())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_padding_changes_no_logits(padded: tuple[Engine, LaunchedStep, InputBuffer], model: Decoder, data) -> None:
    engine, launched, buffer = padded
    batcher = Batcher(model)
    sequences = [batcher.add(random_tokens(30, seed)) for seed in range(3)]
    for _ in range(3):
        parts = [(s, data.draw(st.integers(0, 4), label="new tokens")) for s in sequences]
        parts = [(sequence, count) for sequence, count in parts if count]
        if not parts:
            continue
        inputs, expected = batcher.step(parts)
        exact = StepShape.of(inputs)
        more = data.draw(st.integers(0, 9), label="padding")
        shape = StepShape(exact.tokens + more, exact.sequences + more, exact.blocks + more, exact.logits + more)
        buffer.send(inputs, shape)
        logits = launched.run(shape)
        assert logits.shape == (shape.logits, engine.limits.vocab_size)
        torch.testing.assert_close(logits[: exact.logits], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def padded(in_cache: None, model: Decoder, network_of_model: Imported) -> tuple[Engine, LaunchedStep, InputBuffer]:
    """Steps on the CPU by the references, padded as those of a GPU are."""
    engine = build(Imported(network_of_model.network.copy(), network_of_model.facts), reader(model), EAGER)
    buffer = InputBuffer(engine.limits, torch.device("cpu"))
    return engine, LaunchedStep(engine._step(), buffer), buffer


class Unfinished:
    """A graph whose capture a forbidden call has ended: torch cannot end it in its turn."""

    begun = 0

    def capture_begin(self, **_: object) -> None:
        Unfinished.begun += 1

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_after_a_capture_that_cannot_be_ended_steps_are_launched(
    padded: tuple[Engine, LaunchedStep, InputBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, launched, buffer = padded

    class Forbidden:
        def run(self, shape: StepShape) -> torch.Tensor:
            raise StepError("region layer failed: operation not permitted when stream is capturing")

        def __call__(self, inputs: StepInputs, shape: StepShape) -> torch.Tensor:
            return launched(inputs, shape)

    for name in ("graph_pool_handle", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Unfinished)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    graphed = GraphedStep(Forbidden(), launched, buffer, engine.limits)  # type: ignore[arg-type]
    assert len(list(graphed.capture(list(graphed.buckets.at_open())))) > 1
    assert (len(graphed), Unfinished.begun) == (0, 1)
    assert torch.isfinite(graphed(empty_step())).all()


@pytest.mark.parametrize("failing", ["rehearsal", "capture"])
def test_a_step_that_was_not_captured_waits_for_its_rehearsal(
    padded: tuple[Engine, LaunchedStep, InputBuffer], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Both read the one buffer of inputs, on streams of their own."""
    engine, launched, buffer = padded
    events: list[str] = []

    class Spied:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, shape: StepShape) -> torch.Tensor:
            events.append(self.name)
            if self.name == failing:
                raise torch.OutOfMemoryError
            return launched.run(shape)

        def __call__(self, inputs: StepInputs, shape: StepShape) -> torch.Tensor:
            events.append("launch")
            return launched(inputs, shape)

    current = MagicMock()
    current.wait_stream = lambda _: events.append("wait")
    for name in ("graph_pool_handle", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    graphed = GraphedStep(Spied("capture"), Spied("rehearsal"), buffer, engine.limits)  # type: ignore[arg-type]
    graphed(empty_step())
    assert events == ["rehearsal", "wait", *(["capture"] if failing == "capture" else []), "launch"]


def test_a_step_that_is_too_large_to_be_captured_is_padded_where_kernels_ask(
    padded: tuple[Engine, LaunchedStep, InputBuffer], model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its tokens, but its sequences and block tables: its logits are those of the step as it is."""
    engine, launched, buffer = padded
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    limits = dataclasses.replace(engine.limits, max_num_tokens=32)
    shapes: list[StepShape] = []

    def run(inputs: StepInputs, shape: StepShape) -> torch.Tensor:
        shapes.append(shape)
        return launched(inputs, shape)

    graphed = GraphedStep(run, launched, buffer, limits)  # type: ignore[arg-type]
    batcher = Batcher(model)
    inputs, expected = batcher.step([(batcher.add(random_tokens(40, seed)), 20) for seed in range(3)])
    logits = graphed(inputs)
    most, columns = limits.max_num_seqs, -(-limits.max_model_len // 16)
    assert (most, columns) > (3, inputs.block_tables.shape[1])
    assert shapes == [StepShape(60, most, columns, most)]
    torch.testing.assert_close(logits[:3], expected, rtol=1e-5, atol=1e-5)


# ---- on a GPU

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory, in_cache: None) -> tuple[Engine, Decoder]:
    config = BuildConfig(max_num_seqs=48, max_num_batched_tokens=256, device="cuda", kv_cache_memory=64 << 20)
    model = Decoder()
    engine = build(imported(model), reader(model), config, tmp_path_factory.mktemp("gpu") / "engine")
    return engine, model


@GPU
def test_replayed_steps_equal_the_model_in_any_order(on_gpu: tuple[Engine, Decoder]) -> None:
    engine, model = on_gpu
    rng = random.Random(0)
    batcher = Batcher(model)
    sequences = [batcher.add(random_tokens(64, seed)) for seed in range(12)]
    for _ in range(40):
        chosen = [s for s in sequences if s.computed < 50 and rng.random() < 0.6]
        parts = [(s, 1 if rng.random() < 0.7 else rng.randint(1, 12)) for s in chosen]
        if parts:
            inputs, expected = batcher.step(parts)
            torch.testing.assert_close(engine.execute(inputs).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert len(engine._run) > 10  # type: ignore[arg-type]


@GPU
def test_the_runtime_is_told_the_sizes_of_captured_steps(on_gpu: tuple[Engine, Decoder]) -> None:
    assert on_gpu[0].limits.step_sizes == (64, 128, 160, 192, 256)


@GPU
def test_replay_equals_launch_bit_for_bit(on_gpu: tuple[Engine, Decoder]) -> None:
    engine, model = on_gpu
    graphed = engine._run
    launched = graphed._launched  # type: ignore[union-attr]
    batcher = Batcher(model)
    sequences = [batcher.add(random_tokens(40, seed)) for seed in range(5)]
    for counts in ((9, 1, 30, 2, 17), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (3, 1, 1, 1, 4)):
        inputs, _ = batcher.step(list(zip(sequences, counts, strict=True)))
        shape = graphed.buckets.fitting(StepShape.of(inputs))  # type: ignore[union-attr]
        replayed = engine.execute(inputs).clone()
        assert engine.replayed(inputs) == shape
        launched._buffer.send(inputs, shape)
        again = launched.run(shape)[: len(counts)]  # type: ignore[union-attr]
        assert torch.equal(replayed, again)


@GPU
def test_tokens_of_the_step_before_are_read_on_the_device(on_gpu: tuple[Engine, Decoder]) -> None:
    engine, model = on_gpu
    batcher = Batcher(model)
    sequences = [batcher.add(random_tokens(40, seed)) for seed in range(3)]
    inputs, _ = batcher.step([(s, 7) for s in sequences])
    engine.execute(inputs)
    inputs, expected = batcher.step([(s, 1) for s in sequences])
    sampled = torch.tensor([5, *reversed(inputs.token_ids)], device="cuda")
    hidden = dataclasses.replace(
        inputs, token_ids=np.zeros_like(inputs.token_ids), sampled=sampled, sources=np.array([3, 2, 1])
    )
    torch.testing.assert_close(engine.execute(hidden).cpu(), expected, rtol=1e-4, atol=1e-4)
