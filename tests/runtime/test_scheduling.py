"""The runtime on a fake engine: whatever the memory, the budget and the neighbours, every stream is that of a request
served alone."""

from __future__ import annotations

import random
import subprocess
import sys
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginery.runtime import scheduler
from enginery.runtime.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from enginery.runtime.scheduler import Schedule
from enginery.runtime.session import Session

from .harness import VOCABULARY, check_idle, make_session, run_to_end, step_checked

TORCH_FREE = (
    "scheduler", "block_manager", "prefix_cache", "request", "batch", "detokenizer", "sampling_params", "outputs",
    "intake", "response", "stats", "edits", "beam_search", "stop_strings",
)  # fmt: skip


def random_params(rng: random.Random) -> SamplingParams | BeamSearchParams:
    if rng.random() < 0.15:
        return BeamSearchParams(
            rng.randint(1, 4), rng.randint(1, 20), early_stopping=rng.choice([True, False, "never"])
        )
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3, 5]),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        seed=rng.randrange(10),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        logit_bias=rng.choice([None, None, {rng.randrange(VOCABULARY): 3.0}]),
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        max_tokens=rng.randint(1, 24),
        min_tokens=rng.choice([0, 0, 1]),
        ignore_eos=rng.random() < 0.3,
        output_kind=rng.choice(list(RequestOutputKind)),
    )


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Some of them share long beginnings."""
    stems = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(4, 30))] for _ in range(2)]
    prompts = []
    for _ in range(count):
        stem = rng.choice([*stems, []])
        prompts.append(stem + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 25))])
    return prompts


def facts(output) -> tuple:
    """All that must not depend on how a request was served."""
    completions = [(c.token_ids, c.finish_reason, c.stop_reason, c.cumulative_logprob) for c in output.outputs]
    logprobs = [c.logprobs for c in output.outputs]
    return completions, logprobs, output.prompt_logprobs


def alone(prompt: list[int], params: SamplingParams | BeamSearchParams) -> tuple:
    """The serial reference: one request in a large memory, whole prompt in one step, no cache."""
    session = make_session(prefix_caching=False, eos_token_ids=(7,))
    output = session.generate([prompt], params)[0]
    if isinstance(params, SamplingParams) and params.output_kind is RequestOutputKind.DELTA:
        raise AssertionError("the reference needs whole outputs")
    check_idle(session)
    return facts(output)


def whole(params: SamplingParams | BeamSearchParams) -> SamplingParams | BeamSearchParams:
    if isinstance(params, BeamSearchParams):
        return params
    fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return SamplingParams(**{**fields, "output_kind": RequestOutputKind.CUMULATIVE})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(20, 80),
    max_num_tokens=st.integers(1, 40),
    max_num_seqs=st.integers(1, 10),
    prefix_caching=st.booleans(),
    max_prompt_logits=st.integers(1, 20),
    overlap=st.booleans(),
    step_sizes=st.integers(1, 12).map(lambda size: tuple(range(size, 41, size))),
    many_decoding=st.integers(0, 3),
    least_prompt=st.integers(1, 3),
)
def test_streams_equal_the_serial_reference(
    seed: int,
    num_blocks: int,
    max_num_tokens: int,
    max_num_seqs: int,
    prefix_caching: bool,
    max_prompt_logits: int,
    overlap: bool,
    step_sizes: tuple[int, ...],
    many_decoding: int,
    least_prompt: int,
) -> None:
    rng = random.Random(seed)
    session = make_session(
        num_blocks=num_blocks,
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        step_sizes=step_sizes,
        prefix_caching=prefix_caching,
        max_prompt_logits=max_prompt_logits,
        eos_token_ids=(7,),
        overlap=overlap,
    )
    todo = [(prompt, random_params(rng)) for prompt in random_prompts(rng, 8)]
    wanted: dict[str, tuple] = {}
    cancelled: set[str] = set()
    streamed: dict[str, dict[int, list[int]]] = {}
    final = {}
    while todo or session.has_work:
        while todo and rng.random() < 0.4:
            prompt, params = todo.pop()
            wanted[session.add(prompt, params, priority=rng.choice([0, 0, 1]))] = (prompt, params)
        if wanted and rng.random() < 0.02:
            victim = rng.choice(list(wanted))
            if session.cancel(victim):
                cancelled.add(victim)
        with mock.patch.multiple(scheduler, MANY_DECODING=many_decoding, LEAST_PROMPT=least_prompt):
            outputs = step_checked(session)
        for output in outputs:
            request = wanted[output.request_id]
            if isinstance(request[1], SamplingParams) and request[1].output_kind is RequestOutputKind.DELTA:
                for completion in output.outputs:
                    stream = streamed.setdefault(output.request_id, {}).setdefault(completion.index, [])
                    stream.extend(completion.token_ids)
            if output.finished:
                final[output.request_id] = output
        assert session.stats().num_steps < 5000, "no progress"
    check_idle(session)
    assert final.keys() == wanted.keys()
    for request_id, (prompt, params) in wanted.items():
        if request_id in cancelled:
            assert any(c.finish_reason == "abort" for c in final[request_id].outputs)
            continue
        expected = alone(prompt, whole(params))
        if request_id in streamed:
            tokens = [streamed[request_id][index] for index in sorted(streamed[request_id])]
            assert tokens == [completion[0] for completion in expected[0]]
        else:
            assert facts(final[request_id]) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_happens_and_changes_nothing(overlap: bool) -> None:
    rng = random.Random(5)
    prompts = random_prompts(rng, 12)
    params = SamplingParams(n=2, max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    small = make_session(num_blocks=26, max_num_tokens=16, overlap=overlap)
    outputs = small.generate(prompts, params)
    assert small.stats().num_preemptions > 10
    assert [facts(output) for output in outputs] == [alone(prompt, params) for prompt in prompts]


def watched(session: Session) -> list[Schedule]:
    """The steps that are chosen from now on."""
    chosen: list[Schedule] = []
    choose = session.scheduler.schedule

    def schedule() -> Schedule:
        chosen.append(choose())
        return chosen[-1]

    session.scheduler.schedule = schedule  # type: ignore[method-assign]
    return chosen


def beside_decoding(count: int, lengths: list[int], sizes: tuple[int, ...], **params) -> list[Schedule]:
    """The steps of prompts of these lengths beside so many sequences that decode."""
    session = make_session(num_blocks=1000, max_num_seqs=256, max_model_len=600, prefix_caching=False, step_sizes=sizes)
    for _ in range(count):
        session.add([1], SamplingParams(max_tokens=8, ignore_eos=True))
    step_checked(session)
    steps = watched(session)
    for index, length in enumerate(lengths):
        session.add([index] * length, SamplingParams(max_tokens=2, ignore_eos=True, **params))
    run_to_end(session)
    return steps


def test_a_prompt_beside_many_is_cut_to_the_size_of_a_step() -> None:
    """Its remainder follows in the next step, which is too small to be cut."""
    first, second, third, *_ = beside_decoding(128, [300], (256, 384, 512))
    assert first.num_new == [*[1] * 128, 256]
    assert first.num_tokens == 384
    assert second.num_new == [*[1] * 128, 44]
    assert third.num_new == [1] * 129


def test_the_last_chunk_that_is_long_enough_is_cut() -> None:
    first, second, *_ = beside_decoding(130, [150, 110, 10], (256, 384, 512))
    assert first.num_new == [*[1] * 130, 150, 94, 10]
    assert second.num_new == [*[1] * 131, 16, 1]


@pytest.mark.parametrize(
    ("count", "lengths", "sizes"),
    [
        (127, [300], (256, 384, 512)),  # few decode
        (128, [300], ()),
        (128, [300], (512,)),  # smaller than any size
        (128, [256], (256, 384, 512)),  # of a size already
        (128, [300], (256, 400)),  # larger than any size
        (128, [70], (191, 384)),  # prompts would keep 63 tokens
        (128, [40, 40, 40], (192, 256)),  # no chunk is longer than what is too much
        (128, [380], (256, 384, 512)),  # 124 tokens would wait for 4 rows of padding
    ],
)
def test_no_prompt_is_cut(count: int, lengths: list[int], sizes: tuple[int, ...]) -> None:
    assert beside_decoding(count, lengths, sizes)[0].num_new == [*[1] * count, *lengths]


def test_prompts_keep_64_tokens_beside_many() -> None:
    assert beside_decoding(128, [70], (192, 384))[0].num_new == [*[1] * 128, 64]


def test_a_cut_prompt_has_fewer_rows_of_logits() -> None:
    first, second, *_ = beside_decoding(128, [180], (256, 384), prompt_logprobs=0)
    assert (first.num_new[-1], first.num_prompt_logits) == (128, 128)
    assert (second.num_new[-1], second.num_prompt_logits) == (52, 52)


@pytest.mark.parametrize("overlap", [False, True])
def test_cuts_happen_and_change_nothing(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory runs out, prompts fork and are reported."""
    monkeypatch.setattr(scheduler, "MANY_DECODING", 2)
    monkeypatch.setattr(scheduler, "LEAST_PROMPT", 2)
    rng = random.Random(7)
    todo = [(prompt, whole(random_params(rng))) for prompt in random_prompts(rng, 40)]
    session = make_session(
        num_blocks=60, max_num_tokens=40, step_sizes=tuple(range(8, 48, 8)), overlap=overlap, eos_token_ids=(7,)
    )
    steps = watched(session)
    ids = [session.add(prompt, params) for prompt, params in todo]
    final = run_to_end(session)
    for step in steps:
        excess = step.num_tokens % 8
        decoding = step.num_new.count(1)
        if 2 <= decoding < len(step.num_new) and step.num_tokens - excess - decoding >= 2:
            assert excess in (0, 7) or max(step.num_new) <= excess  # 7 are too many to wait for one row of padding
    assert session.stats().num_preemptions > 0
    assert [facts(final[request_id]) for request_id in ids] == [alone(*request) for request in todo]


def test_a_step_is_launched_before_the_one_before_is_settled() -> None:
    """The host learns a token one step later, and what ended meanwhile is computed once too often, unnoticed."""
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    plain, ahead = make_session(), make_session(overlap=True)
    reports = []
    for session in (plain, ahead):
        session.add([1, 2, 3], params)
        reports.append([len(session.step()) for _ in range(5)])
    assert reports == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    # A last token that max_tokens foretells is not computed any further; one that a stop token ends is, once.
    assert plain.engine.num_steps == ahead.engine.num_steps == 4
    token = plain.generate([[1, 2, 3]], params)[0].outputs[0].token_ids[1]
    stopping = SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=[token])
    for session, steps in ((make_session(), 2), (make_session(overlap=True), 3)):
        assert len(session.generate([[1, 2, 3]], stopping)[0].outputs[0].token_ids) == 2
        run_to_end(session)
        assert session.engine.num_steps == steps


def test_beams_beside_others_in_the_overlapped_loop() -> None:
    """What a beam goes on with is not its own newest token: no step is launched before that is known."""
    rng = random.Random(2)
    kinds = (BeamSearchParams(3, 12), SamplingParams(max_tokens=15, seed=1), BeamSearchParams(2, 9))
    todo = list(zip(random_prompts(rng, 6), kinds * 2, strict=True))
    session = make_session(overlap=True, eos_token_ids=(7,), num_blocks=60, max_num_tokens=20)
    ids = [session.add(prompt, params) for prompt, params in todo]
    final = run_to_end(session, max_steps=500)
    assert [facts(final[request_id]) for request_id in ids] == [alone(*request) for request in todo]


def test_first_come_first_served_within_a_priority() -> None:
    session = make_session(max_num_seqs=1)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    ids = [session.add([index], params, priority=priority) for index, priority in enumerate([1, 1, 0, 0])]
    finished = list(run_to_end(session))
    assert finished == [ids[2], ids[3], ids[0], ids[1]]


def test_a_long_prompt_does_not_stall_running_streams() -> None:
    session = make_session(max_num_tokens=8, max_model_len=400, num_blocks=400)
    quick = session.add([1, 2, 3], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    step_checked(session)
    session.add(list(range(60)) * 5, SamplingParams(max_tokens=1, temperature=0.0), priority=-1)
    for _ in range(20):
        assert quick in [output.request_id for output in step_checked(session)]


def test_no_request_starves_under_a_flood() -> None:
    """A request that arrives is finished within a bounded number of steps although others keep coming."""
    session = make_session(num_blocks=24, max_num_seqs=4, max_num_tokens=16)
    rng = random.Random(2)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    arrived: dict[str, int] = {}
    delays = []
    for step in range(1500):
        if len(session.scheduler.waiting) < 3:
            arrived[session.add([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 60))], params)] = step
        for output in step_checked(session):
            if output.finished:
                delays.append(step - arrived.pop(output.request_id))
    assert len(delays) > 50
    assert max(delays) < 250
    assert all(step > 1500 - 250 for step in arrived.values())


def test_prefix_hits_save_work_and_are_reported() -> None:
    session = make_session()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    prompt = list(range(20))
    first = session.generate([prompt], params)[0]
    second = session.generate([prompt], params)[0]
    other = session.generate([[*prompt[:8], 50, 51, 52, 53, 54]], params)[0]
    unread = session.generate([prompt], SamplingParams(max_tokens=2, temperature=0.0, skip_reading_prefix_cache=True))[
        0
    ]
    assert [o.num_cached_tokens for o in (first, second, other, unread)] == [0, 16, 8, 0]
    assert first.outputs == second.outputs == unread.outputs


@pytest.mark.parametrize("overlap", [False, True])
def test_the_last_block_of_an_output_is_found(overlap: bool) -> None:
    """A follow-up hits every full block of the conversation so far, the one that its last computed token filled too."""
    session = make_session(overlap=overlap)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    output = session.generate([list(range(7))], params)[0]
    run_to_end(session)
    follow_up = [*output.prompt_token_ids, *output.outputs[0].token_ids, 1, 2]
    assert session.generate([follow_up], params)[0].num_cached_tokens == 8


def test_reset_forgets_the_prefixes() -> None:
    session = make_session()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    first = session.generate([list(range(20))], params)[0]
    session.reset_prefix_cache()
    assert len(session.scheduler.cache) == 0
    again = session.generate([list(range(20))], params)[0]
    assert again.num_cached_tokens == 0
    assert again.outputs == first.outputs


def test_other_salts_do_not_hit() -> None:
    session = make_session()
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for salt in ("a", "b", "a"):
        session.add(list(range(20)), params, salt=salt)
        run_to_end(session)
    assert session.stats().num_prefix_hits == 16


def test_parallel_samples_share_the_prompt_and_copy_on_write() -> None:
    session = make_session(block_size=4)
    session.add(list(range(10)), SamplingParams(n=4, max_tokens=30, seed=0))
    step_checked(session)
    assert session.stats().num_used_blocks == 3
    assert session.stats().num_referenced_blocks == 12
    step_checked(session)
    # Two full blocks stay shared; of the partial one each sample has a copy, the last keeps the original.
    assert session.stats().num_used_blocks == 2 + 4
    assert session.engine.num_copies == 3
    output = run_to_end(session)["request-0"]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4


def test_prompt_is_computed_once_for_all_samples() -> None:
    session = make_session(prefix_caching=False)
    session.generate([list(range(40))], SamplingParams(n=8, max_tokens=5, ignore_eos=True))
    assert session.stats().num_scheduled_tokens == 40 + 8 * 4


@pytest.mark.parametrize("overlap", [False, True])
def test_counters_balance(overlap: bool) -> None:
    session = make_session(num_blocks=30, eos_token_ids=(3,), overlap=overlap)
    rng = random.Random(0)
    outputs = []
    ids = [session.add(prompt, SamplingParams(max_tokens=20, n=2)) for prompt in random_prompts(rng, 9)]
    session.step()
    session.cancel(ids[0])
    while session.has_work:
        outputs += [output for output in step_checked(session) if output.finished]
    stats = session.stats()
    assert stats.num_requests == sum(stats.finished.values()) == len(outputs) == 9
    assert stats.finished["abort"] == 1
    assert stats.num_generated_tokens == sum(len(c.token_ids) for o in outputs for c in o.outputs)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_does_not_load_torch(module: str) -> None:
    code = f"import sys, enginery.runtime.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
