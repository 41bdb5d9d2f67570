"""Text token by token, with real tokenizers trained here: byte-level BPE, and SentencePiece-like BPE with byte
fallback."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from enginery.runtime.detokenizer import Detokenizer
from enginery.runtime.sampling_params import RequestOutputKind, SamplingParams
from enginery.runtime.session import Session
from enginery.runtime.stop_strings import OutputText, StopStrings

from .harness import make_session, run_to_end

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "深度学习是机器学习的一个分支。日本語のテキストです。한국어 문장입니다.",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🤷🏽‍♀️ shrug, 😀😃😄",
    "e\u0301 cafe\u0301 n\u0303 a\u0308\u0304 Z\u0351\u036b\u0343",
    "नमस्ते दुनिया  two  spaces\n\n\ttabs \u200b zero width",
    "\U0001d54f\U0001d550 𒀀𒀁 ﷽",
]
CORPUS = ["the quick brown fox jumps over the lazy dog", "learning machines learn", "日本語 学习 テキスト"] * 5


class Plain:
    """The runtime's `Tokenizer` over one of the `tokenizers` package."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.num_decoded = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        self.num_decoded += len(token_ids)
        return self.inner.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids


def byte_level() -> Plain:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return Plain(inner)


def byte_fallback() -> Plain:
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyzT,."})
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for letter in letters:
        vocabulary[letter] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))  # noqa: S106 (not a password)
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<eos>"])
    return Plain(inner)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Plain:
    return request.param()


def pieces(tokenizer: Plain, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", [*TEXTS, " ".join(TEXTS), " ".join(TEXTS) * 8])
def test_pieces_join_to_the_whole_and_hold_no_broken_character(tokenizer: Plain, text: str) -> None:
    token_ids = tokenizer.encode(text)
    found = pieces(tokenizer, token_ids)
    assert "".join(found) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > len(text) / 8


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=120))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = BYTE_LEVEL
    token_ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids) == text


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, 399), max_size=150))
def test_any_bytes_give_what_decoding_the_whole_gives(token_ids: list[int]) -> None:
    token_ids = [token_id % BYTE_LEVEL.inner.get_vocab_size() for token_id in token_ids]
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


BYTE_LEVEL = byte_level()


def test_a_character_is_shown_with_its_last_byte() -> None:
    token_ids = BYTE_LEVEL.encode("a😀b")
    assert len(token_ids) == 6
    assert pieces(BYTE_LEVEL, token_ids) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_is_flushed_as_unknown() -> None:
    assert pieces(BYTE_LEVEL, BYTE_LEVEL.encode("a😀")[:-1])[-1] == "\ufffd"


@pytest.mark.parametrize("name", ["text", "garbage"])
def test_work_grows_linearly(name: str) -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode("学习 " * 2000) if name == "text" else [BYTE_LEVEL.encode("😀")[1]] * 8000
    tokenizer.num_decoded = 0
    pieces(tokenizer, token_ids)
    assert tokenizer.num_decoded < 80 * len(token_ids)


# ---- stop strings


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4)),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    expected = text if not ends else text[: min(ends)[0] if include else min(ends)[1]]
    output = OutputText(StopStrings(tuple(stops)), include)
    shown, rest = "", text
    while rest:
        cut = cuts.pop() if cuts else 1
        stop = output.add(rest[:cut], may_stop=True)
        rest = rest[cut:]
        shown += output.take()
        assert expected.startswith(shown), "showed text that a stop string took back"
        if stop is not None:
            assert stop == min(ends)[2]
            break
    output.is_final = True
    shown += output.take()
    assert shown == output.text == expected


def scripted(tokenizer: Plain, answer: str, **config: Any) -> Session:
    """A session whose model says one text after any prompt of one token, then end of sequence."""
    import torch

    script = [*tokenizer.encode(answer), 0]
    vocab_size = tokenizer.inner.get_vocab_size()

    def logits_of(contexts: list[list[int]]) -> torch.Tensor:
        wanted = torch.tensor([script[min(len(context) - 1, len(script) - 1)] for context in contexts])
        return torch.nn.functional.one_hot(wanted, vocab_size).float() * 50

    return make_session(
        vocab_size=vocab_size, tokenizer=tokenizer, logits_of=logits_of, max_model_len=500, eos_token_ids=(0,), **config
    )


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize(
    ("fields", "text", "reason", "stop_reason"),
    [
        ({}, "one 学习 two😀 three", "stop", None),
        ({"stop": "wo😀 t"}, "one 学习 t", "stop", "wo😀 t"),
        ({"stop": ["zzz", "习 "], "include_stop_str_in_output": True}, "one 学习 ", "stop", "习 "),
        ({"stop": "one", "min_tokens": 8}, "one 学习 two😀 three", "stop", None),
        ({"stop": "three!"}, "one 学习 two😀 three", "stop", None),
        ({"max_tokens": 3}, None, "length", None),
    ],
    ids=str,
)
def test_text_of_a_request(
    fields: dict, text: str | None, reason: str, stop_reason: str | None, kind: RequestOutputKind
) -> None:
    answer = "one 学习 two😀 three"
    session = scripted(BYTE_LEVEL, answer)
    session.add([5], SamplingParams(**{"max_tokens": 100, "temperature": 0.0, "output_kind": kind, **fields}))
    pieces = []
    while session.has_work:
        pieces += [output.outputs[0] for output in session.step()]
    expected = BYTE_LEVEL.decode(BYTE_LEVEL.encode(answer)[:3]) if text is None else text
    whole = "".join(p.text for p in pieces) if kind is RequestOutputKind.DELTA else pieces[-1].text
    assert whole == expected
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (reason, stop_reason)
    if kind is RequestOutputKind.CUMULATIVE:
        assert all(later.text.startswith(earlier.text) for earlier, later in pairwise(pieces))
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(pieces) == 1


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_stop_token_is_reported_and_left_out_of_the_text(kind: RequestOutputKind) -> None:
    answer = "one two three"
    token_ids = BYTE_LEVEL.encode(answer)
    stop = token_ids[3]
    session = scripted(BYTE_LEVEL, answer)
    params = SamplingParams(max_tokens=50, temperature=0.0, stop_token_ids=[stop], output_kind=kind)
    request_id = session.add([5], params)
    completion = run_to_end(session)[request_id].outputs[0]
    end = token_ids.index(stop)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == token_ids[: end + 1]
    assert completion.text == BYTE_LEVEL.decode(token_ids[:end])


def test_bad_words_do_not_appear() -> None:
    rng = random.Random(3)
    session = make_session(vocab_size=BYTE_LEVEL.inner.get_vocab_size(), tokenizer=BYTE_LEVEL, max_model_len=500)
    free = session.generate([[5]], SamplingParams(max_tokens=200, temperature=0.0))[0].outputs[0]
    words = [BYTE_LEVEL.decode([token_id]) for token_id in rng.sample(free.token_ids, 8)]
    words = [word for word in words if word.strip() and "\ufffd" not in word]
    assert words
    banned = session.generate([[5]], SamplingParams(max_tokens=200, temperature=0.0, bad_words=words))[0].outputs[0]
    singles = [BYTE_LEVEL.encode(text) for word in words for text in (word.lstrip(), " " + word.lstrip())]
    for token_ids in singles:
        windows = [banned.token_ids[i : i + len(token_ids)] for i in range(len(banned.token_ids))]
        assert token_ids not in windows
    assert banned.token_ids != free.token_ids


def test_cancelled_request_shows_what_was_held_back() -> None:
    session = scripted(BYTE_LEVEL, "abcdefgh")
    request_id = session.add([5], SamplingParams(max_tokens=50, temperature=0.0, stop="abcX"))
    for _ in range(3):
        shown = session.step()[0].outputs[0].text
    assert shown == ""
    session.cancel(request_id)
    assert run_to_end(session)[request_id].outputs[0].text == "abc"
