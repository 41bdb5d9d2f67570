"""The record of a load's steps: their kinds, their sums, and that engines run as before once it is done."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from tests.engine.conftest import EAGER
from tests.engine.decoder import Batcher, Decoder, imported, random_tokens, reader

from decoder import tables
from decoder.steps import Step, kind_of, recorded, summary
from enginery.engine.builder import build
from enginery.engine.engine import Engine
from enginery.engine.graphs import LaunchedStep
from enginery.engine.inputs import InputBuffer, StepShape
from enginery.runtime.sampler import Sampler
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.session import Session


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder()


@pytest.fixture
def engine(model: Decoder) -> Engine:
    return build(imported(model), reader(model), EAGER)


@pytest.mark.parametrize(
    ("tokens", "sequences", "kind"),
    [
        (1, 1, "decode ≤ 32"),
        (32, 32, "decode ≤ 32"),
        (33, 33, "decode ≤ 128"),
        (129, 129, "decode > 128"),
        (33, 32, "mixed ≤ 256"),
        (257, 256, "mixed ≤ 512"),
        (1024, 9, "mixed ≤ 1024"),
        (2048, 1, "mixed ≤ 2048"),
        (2049, 1, "mixed > 2048"),
    ],
)
def test_steps_are_sorted_by_what_they_cost(tokens: int, sequences: int, kind: str) -> None:
    assert kind_of(StepShape(tokens, sequences, 4, sequences)) == kind


def sums_by_hand() -> dict:
    """A prompt launched as it is, then two steps of decoding, replayed in the shape of four sequences."""
    four = StepShape(4, 4, 8, 4)
    steps = [
        Step(StepShape(9, 3, 8, 3), None, 1.000, 1.020, 1.021),
        Step(StepShape(3, 3, 8, 3), four, 1.021, 1.026, 1.027),
        Step(StepShape(3, 3, 8, 3), four, 1.030, 1.036, 1.036),
    ]
    return {"value": 0.05, "unit": "s", **summary(steps, 0.05)}


def test_device_time_and_waits_are_summed_by_kind() -> None:
    found = sums_by_hand()
    assert found["device, s"] == pytest.approx(0.033)
    assert found["device waits, s"] == pytest.approx(0.017)
    assert list(found["kinds"]) == ["decode ≤ 32", "mixed ≤ 256"]
    decode, mixed = found["kinds"].values()
    assert decode == pytest.approx(
        {
            "steps": 2, "replayed": 2, "tokens": 6, "padded": 8,
            "engine, ms": 11, "sampling, ms": 1, "waits, ms": 3, "engine, ms/step": 5.5,
        }
    )  # fmt: skip
    assert (mixed["replayed"], mixed["padded"], mixed["waits, ms"]) == (0, 9, 0)


def test_the_table_of_steps() -> None:
    record = {
        "hardware": {"cpu": "a processor"}, "versions": {"torch": "9.9"}, "shape": "tiny",
        "results": {"enginery bf16 steps": sums_by_hand()},
    }  # fmt: skip
    assert tables.tables(record).endswith(
        """\
### enginery bf16 steps: 0.05 s, of which the device works 0.03 s and waits 0.02 s

| kind | steps | replayed | tokens | padded | engine, ms | ms/step | sampling, ms | waits, ms | share |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| decode ≤ 32 | 2 | 2 | 6 | 8 | 11 | 5.50 | 1 | 3 | 30.0 % |
| mixed ≤ 256 | 1 | 0 | 9 | 9 | 20 | 20.00 | 1 | 0 | 42.0 % |"""
    )
    assert "| bf16, steps" not in tables.tables(record)


def test_every_step_of_a_session_is_recorded(engine: Engine) -> None:
    methods = Engine.execute, InputBuffer.send, Sampler.sample
    session = Session(engine)
    with recorded(cuda=False) as steps:
        outputs = session.generate([random_tokens(9, 1), random_tokens(4, 2)], SamplingParams(max_tokens=3))
        assert all(len(output.outputs[0].token_ids) == 3 for output in outputs)
    assert [step.shape.tokens for step in steps] == [13, 2, 2]
    assert all(step.replayed is None for step in steps)
    assert all(step.begin < step.computed < step.sampled for step in steps)
    assert all(first.sampled < second.begin for first, second in pairwise(steps))
    assert (Engine.execute, InputBuffer.send, Sampler.sample) == methods


def test_time_begins_when_the_inputs_are_sent(engine: Engine, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = InputBuffer(engine.limits, torch.device("cpu"))
    engine._run = LaunchedStep(engine._step(), buffer)
    batcher = Batcher(model)
    inputs, expected = batcher.step([(batcher.add(random_tokens(9, 1)), 5)])
    sent: list[float] = []
    send = InputBuffer.send

    def watched(*arguments) -> None:
        send(*arguments)
        sent.append(time.perf_counter())

    monkeypatch.setattr(InputBuffer, "send", watched)
    with recorded(cuda=False) as steps:
        torch.testing.assert_close(engine.execute(inputs), expected, rtol=1e-5, atol=1e-5)
    (step,) = steps
    assert sent[0] <= step.begin < step.computed == step.sampled
