"""A step whose newest tokens are still on the device gives what it gives where the host knows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enginery.engine.protocol import EngineLimits
from enginery.runtime.batch import Batch, SamplingInputs
from enginery.runtime.draws import Draws, HostDraws
from enginery.runtime.intake import Intake
from enginery.runtime.request import Request, Sequence
from enginery.runtime.sampler import Sampler, Samples
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.scheduler import BlockChange, Schedule

VOCABULARY = 12  # small, so that tokens repeat and bad words occur
LIMITS = EngineLimits(VOCABULARY, 64, 64, 16, 64, 4)
TOKENS = st.integers(0, VOCABULARY - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.9]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.3, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.9, -0.6]),
    logit_bias=st.none() | st.dictionaries(TOKENS, st.floats(-5, 5, width=32), max_size=3),
    stop_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
    min_tokens=st.integers(0, 8),
    logprobs=st.none() | st.integers(0, 4),
    seed=st.integers(0, 2**32),
)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """In the midst of its output, all of which the host knows."""
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=6))
    output = draw(st.lists(TOKENS, min_size=1, max_size=6))
    bad_words = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=6))
    if draw(st.booleans()):
        bad_words.append([*output[-draw(st.integers(1, 3)) :], draw(TOKENS)])
    params = draw(PARAMS)
    intake = Intake(LIMITS, None, ())
    fields = {"request_id": "r", "number": 0, "priority": 0, "salt": "", "prompt": None}
    request: Request = intake.request(prompt, params, **fields)
    request.seed = params.seed or 0
    request.bad_word_ids = tuple(bad_words)
    request.has_edits |= bool(bad_words)
    request.is_prefilled = True
    sequence = Sequence(request, 0, [*prompt, *output])
    sequence.blocks = list(range(16))
    return sequence


def sampling_inputs(batch: list[Sequence], sampled: torch.Tensor | None) -> SamplingInputs:
    for row, sequence in enumerate(batch):
        sequence.row = row
        sequence.num_computed = sequence.num_tokens - 1
        sequence.token_counts = None
    rows = Batch(LIMITS)
    changes = [BlockChange(sequence, 0, None) for sequence in batch]
    inputs, plan = rows.inputs(Schedule(batch, [1] * len(batch), changes, len(batch)), sampled)
    return rows.sampling_inputs(inputs, plan)


def outcome(sampler: Sampler, logits: torch.Tensor, inputs: SamplingInputs) -> Samples:
    return sampler.sample(logits.clone(), inputs).wait()


@pytest.mark.parametrize("draws", [HostDraws, Draws])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pending_is_as_good_as_known(draws: type[Draws], data: st.DataObject) -> None:
    batch = data.draw(st.lists(sequences(), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 2**32))
    logits = torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    sampler = Sampler(draws())
    known = outcome(sampler, logits, sampling_inputs(batch, None))

    order = data.draw(st.permutations(range(len(batch))))
    sampled = torch.zeros(len(batch), dtype=torch.int64)
    for sequence, place in zip(batch, order, strict=True):
        if data.draw(st.booleans()):
            sampled[place] = sequence.token_ids.pop()
            sequence.num_pending, sequence.place = 1, place
    pending = outcome(sampler, logits, sampling_inputs(batch, sampled))

    assert pending.token_ids == known.token_ids
    assert pending.failed == known.failed
    assert pending.logprobs_row == known.logprobs_row
    assert (pending.logprobs is None) == (known.logprobs is None)
    if pending.logprobs is not None and known.logprobs is not None:
        for name in ("chosen", "ranks", "token_ids", "values"):
            np.testing.assert_array_equal(getattr(pending.logprobs, name), getattr(known.logprobs, name))


def one(
    params: SamplingParams, prompt: list[int], output: list[int], bad_words: tuple[list[int], ...] = ()
) -> Sequence:
    fields = {"request_id": "r", "number": 0, "priority": 0, "salt": "", "prompt": None}
    request = Intake(LIMITS, None, ()).request(prompt, params, **fields)
    request.bad_word_ids = bad_words
    request.has_edits |= bool(bad_words)
    request.is_prefilled = True
    sequence = Sequence(request, 0, [*prompt, *output])
    sequence.blocks = list(range(16))
    sequence.num_pending, sequence.place = 1, 0
    return sequence


def edited(sequence: Sequence, pending: int) -> list[float]:
    """The logits of the next token, from zeros, after a pending token."""
    logits = torch.zeros(1, VOCABULARY)
    sampled = torch.tensor([pending])
    Sampler(Draws()).sample(logits, sampling_inputs([sequence], sampled)).wait()
    return logits[0].tolist()


def test_a_bad_word_is_banned_only_after_the_pending_token_that_it_needs() -> None:
    sequence = one(SamplingParams(temperature=0.0), [7], [1], ([1, 2, 3], [4, 5], [7, 1, 9, 6], [8]))
    assert [token for token, value in enumerate(edited(sequence, 2)) if value < 0] == [3, 8]
    assert [token for token, value in enumerate(edited(sequence, 4)) if value < 0] == [5, 8]
    # 7 is of the prompt, so 7 1 9 6 has not begun.
    assert [token for token, value in enumerate(edited(sequence, 9)) if value < 0] == [8]


def test_the_pending_token_is_penalised_once_more() -> None:
    sequence = one(SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25), [7], [1, 1])
    assert edited(sequence, 1)[1] == -0.5 * 3 - 0.25
    values = edited(sequence, 4)
    assert (values[1], values[4], values[7]) == (-0.5 * 2 - 0.25, -0.5 - 0.25, 0.0)


def test_the_pending_token_counts_for_min_tokens() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(3,))
    assert edited(one(params, [7], []), 1)[3] == -np.inf
    assert edited(one(params, [7], [1]), 1)[3] == 0.0
