"""Requests that are wrong, engines that fail, and what a session does about them."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.errors import DeviceError, QueueFullError, RequestError, StepError, UsageError
from enginery.runtime.fake_engine import FakeEngine
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams
from enginery.runtime.session import Session, SessionConfig

from .harness import VOCABULARY, check_idle, make_session, run_to_end

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "n .*1 to 128"),
        ({"n": 10**9}, "128"),
        ({"n": True}, "n"),
        ({"temperature": math.nan}, "temperature.*0 to 100"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p.*above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty.*-2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs.*20"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ["x"] * 10_000}, "stop.*16"),
        ({"stop": "x" * 129}, "128"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "x", "detokenize": False}, "detokenize"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True, 1.5]}, "stop_token_ids"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias.*1024"),
        ({"logit_bias": {1: math.nan}}, "logit_bias.*-100 to 100"),
        ({"logit_bias": {"1": 1.0}}, "token id"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "a"}, "seed"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        SamplingParams(**fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 0},
        {"beam_width": 65},
        {"beam_width": 2, "n": 3},
        {"beam_width": 2, "length_penalty": math.nan},
        {"beam_width": 2, "early_stopping": "maybe"},
    ],
    ids=str,
)
def test_beam_parameters_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(RequestError):
        BeamSearchParams(**fields)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "empty"),
        ([-1], GREEDY, "token id -1 .*0 to 60"),
        ([1, VOCABULARY], GREEDY, f"token id {VOCABULARY} "),
        ([True], GREEDY, "bool"),
        ([1.0], GREEDY, "float"),
        ([[1]], GREEDY, "list"),
        ("text", GREEDY, "str"),
        ([1] * 96, GREEDY, "maximum context length is 96 tokens"),
        ([1] * 200, GREEDY, "maximum context length"),
        ([1] * 92, GREEDY, "maximum context length.*92 \\+ 5 = 97.*at most 4"),
        ([1], SamplingParams(stop="x"), "tokenizer"),
        ([1], SamplingParams(logit_bias={VOCABULARY: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop_token_ids=[10**6]), "stop_token_ids"),
        ([1], None, "SamplingParams"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_served_are_refused(prompt: list, params: SamplingParams, words: str) -> None:
    session = make_session()
    with pytest.raises(RequestError, match=words) as caught:
        session.add(prompt, params)
    assert "\n" not in str(caught.value)
    check_idle(session)


def test_memory_too_small_for_a_request_names_the_length_that_fits() -> None:
    session = make_session(num_blocks=5, block_size=4)
    with pytest.raises(RequestError, match=r"KV memory holds 20 tokens.*needs 21.*at most 20"):
        session.add([1] * 16, GREEDY)
    completion = session.generate([[1] * 15], GREEDY)[0].outputs[0]
    assert len(completion.token_ids) == 5
    assert len(session.generate([[1] * 15], SamplingParams(max_tokens=None))[0].outputs[0].token_ids) == 5


def test_without_max_tokens_generation_ends_with_the_context() -> None:
    output = make_session().generate([[1] * 50], SamplingParams(max_tokens=None, temperature=0.0))[0]
    assert len(output.outputs[0].token_ids) == 46
    assert output.outputs[0].finish_reason == "length"


def test_numpy_prompts_are_welcome() -> None:
    session = make_session()
    outputs = session.generate([np.array([1, 2, 3]), (1, 2, 3), [1, 2, 3]], GREEDY)
    assert outputs[0].outputs == outputs[1].outputs == outputs[2].outputs


@pytest.mark.parametrize(
    "label", [{"request_id": ""}, {"request_id": "x" * 129}, {"salt": "x" * 257}, {"priority": "high"}]
)
def test_labels_are_bounded(label: dict) -> None:
    with pytest.raises(RequestError):
        make_session().add([1], GREEDY, **label)


def test_request_ids_are_unique_while_running() -> None:
    session = make_session()
    session.add([1], GREEDY, request_id="a")
    with pytest.raises(RequestError, match="in use"):
        session.add([1], GREEDY, request_id="a")
    run_to_end(session)
    session.add([1], GREEDY, request_id="a")
    assert "a" in run_to_end(session)


def test_queue_is_bounded() -> None:
    session = make_session(max_waiting=3)
    for _ in range(3):
        session.add([1], GREEDY)
    with pytest.raises(QueueFullError):
        session.add([1], GREEDY)
    session.step()
    session.add([1], GREEDY)
    assert len(run_to_end(session)) == 4
    assert len(session.generate([[1]] * 20, GREEDY)) == 20
    with pytest.raises(UsageError):
        SessionConfig(max_waiting=0)


LENGTHS = (1, 2, 2, 3, 1, 12, 3)


@pytest.mark.parametrize(("num_blocks", "steps"), [(512, 12), (6, 12), (5, 16)])
def test_of_a_batch_the_longest_start_first_if_they_fit_side_by_side(num_blocks: int, steps: int) -> None:
    session = make_session(max_num_seqs=2, num_blocks=num_blocks)
    params = [SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for length in LENGTHS]
    prompts = [[place, 5, 5, 5] for place in range(len(LENGTHS))]
    outputs = session.generate(prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(LENGTHS)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert session.stats().num_steps == steps
    check_idle(session)


def test_several_completions_count_as_so_many_requests() -> None:
    """Five requests of two each do not all run at once on four rows: the long one starts first."""
    session = make_session(max_num_seqs=4)
    lengths = (2, 2, 2, 2, 9)
    params = [SamplingParams(n=2, max_tokens=length, ignore_eos=True, seed=3) for length in lengths]
    session.generate([[place] for place in range(5)], params)
    assert session.stats().num_steps < 12


def test_a_prompt_to_the_end_of_the_context_counts_no_more_than_that() -> None:
    session = make_session(max_num_seqs=2, num_blocks=48)
    prompts = [[1] * 50, *([2] * 50 for _ in range(4))]
    params = [SamplingParams(max_tokens=2), *(SamplingParams(max_tokens=None) for _ in range(4))]
    assert session._longest_first(prompts, params) == [44, 0, 0, 0, 0]


def test_a_batch_overtakes_nothing_that_was_added_before() -> None:
    session = make_session(max_num_seqs=1)
    params = [SamplingParams(max_tokens=length) for length in (2, 9, 5)]
    assert session._longest_first([[2]] * 3, params) == [7, 0, 4]


def test_generate_leaves_nothing_behind_when_a_prompt_is_wrong() -> None:
    session = make_session()
    with pytest.raises(RequestError):
        session.generate([[1], [1], [-5]], GREEDY)
    run_to_end(session)
    assert len(session.generate([[1], [2]], [GREEDY, SamplingParams(max_tokens=2)])) == 2


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("moment", range(8))
def test_cancel_frees_memory_at_once(moment: int, overlap: bool) -> None:
    session = make_session(max_num_tokens=6, overlap=overlap)
    request_id = session.add(list(range(20)), SamplingParams(n=3, max_tokens=30, ignore_eos=True))
    for _ in range(moment):
        session.step()
    assert session.cancel(request_id)
    assert not session.cancel(request_id)
    assert session.scheduler.blocks.num_used == 0
    output = run_to_end(session)[request_id]
    assert {completion.finish_reason for completion in output.outputs} == {"abort"}


class FailingEngine(FakeEngine):
    """Cannot run a step that holds token 13, nor every k-th call; gives NaN after token 17."""

    def __init__(self, limits: EngineLimits, every: int = 0) -> None:
        super().__init__(limits)
        self.calls = 0
        self.every = every

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        self.calls += 1
        inputs = inputs.resolved()
        if self.every and self.calls % self.every == 0:
            raise MemoryError("injected")
        if (inputs.token_ids == 13).any():
            raise ValueError("no thirteen\nhere")
        logits = super().execute(inputs)
        logits[:, [13, 17]] = -1e9
        for row, index in enumerate(inputs.logits_indices):
            if inputs.token_ids[index] == 17:
                logits[row] = math.nan
        return logits


def failing_session(every: int = 0, **config) -> Session:
    return Session(
        FailingEngine(EngineLimits(VOCABULARY, 96, 64, 16, 200, 4), every), config=SessionConfig(seed=1, **config)
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_one_bad_request_fails_alone(overlap: bool) -> None:
    prompts = [[1, 2, 3], [5, 13], [4, 4, 4, 4, 17], [7, 8, 9]]
    params = SamplingParams(max_tokens=8, temperature=0.0, n=2)
    healthy = failing_session().generate([prompts[0], prompts[3]], params)
    session = failing_session(overlap=overlap)
    outputs = session.generate(prompts, params)
    run_to_end(session)
    assert [outputs[0].outputs, outputs[3].outputs] == [output.outputs for output in healthy]
    assert [completion.finish_reason for completion in outputs[1].outputs] == ["error"]
    assert outputs[1].outputs[0].error == "ValueError: no thirteen here"
    assert outputs[2].outputs[0].finish_reason == "error"
    assert "finite" in (outputs[2].outputs[0].error or "")
    assert session.stats().finished == {"error": 2, "length": 2}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_failed_keeps_no_tensor(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory was missing, the next sequence needs it."""
    session = make_session(overlap=overlap)
    held: list[weakref.ref[torch.Tensor]] = []

    def execute(inputs: StepInputs) -> torch.Tensor:
        assert [reference() for reference in held] == [None] * len(held)
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise StepError("no room") from torch.OutOfMemoryError()

    monkeypatch.setattr(session.engine, "execute", execute)
    gc.disable()
    try:
        outputs = session.generate([[1], [2], [3]], SamplingParams(max_tokens=4))
    finally:
        gc.enable()
    assert [output.outputs[0].error for output in outputs] == ["StepError: no room"] * 3
    assert len(held) == 4


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_passing_failures_of_the_engine_cost_nothing(prefix_caching: bool, overlap: bool) -> None:
    prompts = [[index, 2, 3, 4, 5, 6, index] for index in range(8)]
    params = SamplingParams(max_tokens=20, n=2, seed=4)
    expected = failing_session().generate(prompts, params)
    # Every second call fails: a step of many, or one of the sequences run by themselves.
    session = failing_session(every=25, prefix_caching=prefix_caching, overlap=overlap)
    outputs = session.generate(prompts, params)
    run_to_end(session)
    wrong = [o for o, e in zip(outputs, expected, strict=True) if o.outputs != e.outputs]
    assert all(c.finish_reason == "error" for output in wrong for c in output.outputs if c.error)
    assert len(wrong) <= 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_dead_engine_ends_every_request(overlap: bool) -> None:
    session = failing_session(every=1, overlap=overlap)
    outputs = session.generate([[1], [2], [3]], GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 3
    check_idle(session)


class LostEngine(FakeEngine):
    """Its device dies at the third step."""

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        if self.num_steps == 2:
            raise DeviceError("the GPU failed: an illegal memory access was encountered", "Start again")
        return super().execute(inputs)


def test_a_lost_device_ends_the_session_with_one_error() -> None:
    session = Session(LostEngine(EngineLimits(VOCABULARY, 96, 64, 16, 200, 4)))
    with pytest.raises(DeviceError, match="illegal memory access"):
        session.generate([[1], [2]], GREEDY)


def test_every_banned_token_is_an_error_of_that_request() -> None:
    session = make_session(vocab_size=4, logits_of=lambda contexts: torch.full((len(contexts), 4), -math.inf))
    assert session.generate([[1]], GREEDY)[0].outputs[0].finish_reason == "error"


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_computed_behind_an_end_cannot_fail_the_other_completions(overlap: bool) -> None:
    def logits_of(contexts: list[list[int]]) -> torch.Tensor:
        logits = torch.full((len(contexts), VOCABULARY), -1e9)
        for row, context in zip(logits, contexts, strict=True):
            row[[1, 7] if len(context) == 2 else [1]] = 0.0
            if context[-1] == 7:
                row.fill_(math.nan)
        return logits

    session = make_session(logits_of=logits_of, overlap=overlap, eos_token_ids=(7,))
    (output,) = session.generate([[3]], SamplingParams(n=8, max_tokens=6, seed=0))
    assert {completion.finish_reason for completion in output.outputs} == {"stop", "length"}
    check_idle(session)


def test_end_of_sequence_and_min_tokens() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0])
    session = make_session(
        vocab_size=3, eos_token_ids=(1,), logits_of=lambda contexts: logits.expand(len(contexts), -1).clone()
    )
    ends = session.generate([[0]], GREEDY)[0].outputs[0]
    assert (ends.token_ids, ends.finish_reason, ends.stop_reason) == ([1], "stop", None)
    later = session.generate([[0]], SamplingParams(max_tokens=5, min_tokens=3, temperature=0.0))[0].outputs[0]
    assert later.token_ids == [2, 2, 2, 1]
    ignored = session.generate([[0]], SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0))[0].outputs[0]
    assert ignored.token_ids == [1] * 5
    stopped = session.generate([[0]], SamplingParams(stop_token_ids=[1], ignore_eos=True, temperature=0.0))[0].outputs[
        0
    ]
    assert (stopped.token_ids, stopped.stop_reason) == ([1], 1)


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs(budget: int) -> None:
    session = make_session(max_num_tokens=budget, max_prompt_logits=5)
    prompt = list(range(1, 24))
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2, logprobs=0)
    for _ in range(2):  # the second time the prompt is cached
        output = session.generate([prompt], params)[0]
        assert output.prompt_logprobs is not None
        assert output.num_cached_tokens == 0
        assert output.prompt_logprobs[0] is None
        engine = session.engine
        assert isinstance(engine, FakeEngine)
        for position in range(1, len(prompt)):
            expected = torch.log_softmax(engine._hashed_logits([prompt[:position]])[0], 0)
            found = output.prompt_logprobs[position]
            assert found is not None
            assert set(found) == {prompt[position], *torch.topk(expected, 2).indices.tolist()}
            for token_id, logprob in found.items():
                assert logprob.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
                assert logprob.rank == int((expected > expected[token_id]).sum()) + 1
    assert [list(position) for position in output.outputs[0].logprobs or []] == [
        [t] for t in output.outputs[0].token_ids
    ]


def test_seeds() -> None:
    session = make_session()

    def draw(**fields) -> list[int]:
        return session.generate([[1, 2]], SamplingParams(max_tokens=12, **fields))[0].outputs[0].token_ids

    assert draw(seed=5) == draw(seed=5) != draw(seed=6)
    assert draw() != draw()
    first, second = session.generate([[1, 2]], SamplingParams(max_tokens=12, n=2, seed=5))[0].outputs
    assert first.token_ids == draw(seed=5) != second.token_ids
    streams = [make_session(seed=9).generate([[1]] * 3, SamplingParams(max_tokens=12)) for _ in range(2)]
    assert [o.outputs for o in streams[0]] == [o.outputs for o in streams[1]]
    assert streams[0][0].outputs[0].token_ids != streams[0][1].outputs[0].token_ids


def test_metrics_and_stats() -> None:
    session = make_session(num_blocks=10, block_size=4)
    session.add([1] * 6, SamplingParams(max_tokens=4, temperature=0.0))
    session.step()
    stats = session.stats()
    assert (stats.num_running, stats.num_used_blocks, stats.kv_usage, stats.kv_waste) == (1, 2, 0.2, 0.25)
    metrics = run_to_end(session)["request-0"].metrics
    assert metrics is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time  # type: ignore[operator]
    assert session.stats().host_seconds > 0
