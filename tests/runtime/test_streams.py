"""Several callers of one session: each has the outputs of its own request, and none waits for ever."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from enginery.errors import UsageError
from enginery.runtime.outputs import RequestOutput
from enginery.runtime.sampling_params import RequestOutputKind, SamplingParams
from enginery.runtime.session import Session
from enginery.runtime.streams import Stream, Streams

from .harness import check_idle, make_session

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)
PROMPTS = [[1, 2, 3], [4, 5], [6]]


def open_stream(streams: Streams, session: Session, prompt: list[int], params: SamplingParams = GREEDY) -> Stream:
    return streams.open(session.add(prompt, replace(params, output_kind=RequestOutputKind.DELTA)))


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.outputs[0].token_ids]


def alone() -> list[list[int]]:
    return [output.outputs[0].token_ids for output in make_session().generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("overlap", [False, True])
def test_streams_that_are_open_at_once_have_their_own_outputs(overlap: bool) -> None:
    session = make_session(overlap=overlap)
    streams = Streams(session)
    each = [open_stream(streams, session, prompt) for prompt in PROMPTS]
    found = [[next(stream)] for stream in each]
    for outputs, stream in zip(found, each, strict=True):
        outputs += stream
        assert list(stream) == []
    assert [tokens(outputs) for outputs in found] == alone()
    assert [[output.finished for output in outputs] for outputs in found] == [[False] * 4 + [True]] * 3
    check_idle(session)


def test_a_batch_in_the_middle_of_a_stream_takes_nothing_from_it() -> None:
    session = make_session()
    streams = Streams(session)
    stream = open_stream(streams, session, PROMPTS[0])
    found = [next(stream)]
    batch = session.generate(PROMPTS[1:], GREEDY)
    found += stream
    assert [tokens(found), *(output.outputs[0].token_ids for output in batch)] == alone()
    check_idle(session)


def test_a_stream_that_was_let_go_is_cancelled_before_the_next_step() -> None:
    session = make_session()
    streams = Streams(session)
    for _ in range(3):
        open_stream(streams, session, PROMPTS[0])
    gc.collect()
    begun = open_stream(streams, session, PROMPTS[1])
    next(begun)
    assert session.stats().num_running == 1
    assert session.stats().finished == {"abort": 3}
    begun.close()
    begun.close()
    assert list(begun) == []
    list(open_stream(streams, session, PROMPTS[2]))
    check_idle(session)


def test_a_stream_whose_request_was_cancelled_or_served_elsewhere_ends() -> None:
    session = make_session()
    streams = Streams(session)
    cancelled, lost = (open_stream(streams, session, prompt) for prompt in PROMPTS[:2])
    session.cancel(cancelled.request_id)
    assert [output.outputs[0].finish_reason for output in cancelled] == ["abort"]
    while session.has_work:
        session.step()
    assert len(list(lost)) <= 1


def test_threads_take_turns() -> None:
    session = make_session()
    streams = Streams(session)

    def batch(prompts: list[list[int]]) -> list[list[int]]:
        with streams.turn():
            return [output.outputs[0].token_ids for output in session.generate(prompts, GREEDY)]

    def stream_of(prompt: list[int]) -> list[int]:
        with streams.turn():
            stream = open_stream(streams, session, prompt)
        return tokens(list(stream))

    with ThreadPoolExecutor(4) as pool:
        streamed = [pool.submit(stream_of, prompt) for prompt in PROMPTS]
        batches = [pool.submit(batch, PROMPTS) for _ in range(4)]
        assert [each.result(timeout=60) for each in streamed] == alone()
        assert [each.result(timeout=60) for each in batches] == [alone()] * 4
    check_idle(session)


def test_a_session_that_is_closed_takes_nothing() -> None:
    session = make_session()
    session.close()
    with pytest.raises(UsageError, match=r"the model is closed. Open it again"):
        session.add([1], GREEDY)
