"""The public interface on the bundled model: text in, text out, by both backends, with transformers as the referee."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import enginery.llm
from enginery import LLM, SamplingParams, env
from enginery.errors import CheckpointError, EngineryWarning, RequestError, UsageError
from enginery.kernels.table import TABLE
from enginery.llm import BUNDLED_MODEL
from enginery.runtime.sampling_params import BeamSearchParams

QUESTIONS = {"What is 17 + 25?": "42", "What is 900 - 1?": "899", "Reverse the word planet": "tenalp"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(backend="eager", dtype="float32", kv_cache_memory=64 << 20, max_num_seqs=16) as model:
        yield model


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_takes_one_conversation_or_a_list(llm: LLM) -> None:
    outputs = llm.chat([ask(question) for question in QUESTIONS], GREEDY)
    assert [output.outputs[0].text for output in outputs] == list(QUESTIONS.values())
    (single,) = llm.chat(ask("What is 17 + 25?"), GREEDY)
    assert single.outputs[0].text == "42"
    assert single.outputs[0].finish_reason == "stop"
    assert single.finished


def test_a_conversation_is_remembered(llm: LLM) -> None:
    turns = [*ask("What is 2 + 3?"), {"role": "assistant", "content": "5"}, *ask("What is 7 + 3?")]
    assert llm.chat(turns, GREEDY)[0].outputs[0].text == "10"


def test_greedy_tokens_and_logprobs_are_those_of_transformers(llm: LLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.encode(text) for text in ("1, 2, 3,", "The word planet", "Numbers: 40, 41,")]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = list(prompt)
        with torch.inference_mode():
            for _ in range(32):
                expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
            scores = torch.log_softmax(model(torch.tensor([expected])).logits[0].double(), dim=-1)
        completion = output.outputs[0]
        assert completion.token_ids == expected[len(prompt) :]
        assert completion.logprobs is not None
        for place, (token, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            assert found[token].logprob == pytest.approx(float(scores[len(prompt) - 1 + place, token]), abs=1e-4)


def test_prompts_may_be_text_ids_or_mappings(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("1, 2, 3,")
    forms = ["1, 2, 3,", ids, {"prompt": "1, 2, 3,"}, {"prompt_token_ids": ids}]
    texts = {output.outputs[0].text for output in llm.generate(forms, GREEDY)}
    assert len(texts) == 1
    assert llm.generate(ids, GREEDY)[0].outputs[0].text in texts
    assert llm.generate("1, 2, 3,", GREEDY)[0].prompt == "1, 2, 3,"


def test_stream_yields_what_is_new(llm: LLM) -> None:
    chunks = list(llm.stream(ask("Count from 3 to 9"), GREEDY))
    whole = llm.chat(ask("Count from 3 to 9"), GREEDY)[0].outputs[0]
    assert len(chunks) > 3
    assert "".join(chunk.outputs[0].text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.outputs[0].token_ids] == whole.token_ids
    assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_closing_a_stream_frees_its_memory(llm: LLM) -> None:
    stream = llm.stream(ask("Count from 1 to 40"), SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    next(stream)
    assert llm.metrics().num_running == 1
    stream.close()
    assert llm.metrics().num_running == 0
    assert llm.metrics().num_used_blocks == 0
    assert llm.metrics().peak_used_blocks > 0


def test_what_is_no_prompt_is_told(llm: LLM) -> None:
    forms = "Give text, token ids, "
    for prompt, words in (
        (None, f"the prompt is a NoneType. {forms}"),
        (5, f"the prompt is a int. {forms}"),
        ([None], f"the prompt is a NoneType. {forms}"),
        ({"prompt_token_ids": None}, f"the prompt is a NoneType. {forms}"),
        ([5, "a"], "the prompt holds a str"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    for messages in ("hello", {"role": "user", "content": "hello"}, 5):
        with pytest.raises(RequestError, match=r"the conversation is a .*Give a list of {'role'"):
            llm.chat(messages, GREEDY)  # type: ignore[arg-type]
    for params in ({"max_tokens": 3}, [None], "greedy"):
        with pytest.raises(RequestError, match=r"params is a .*Give SamplingParams"):
            llm.generate("a", params)  # type: ignore[arg-type]
    for params in ({"max_tokens": 3}, BeamSearchParams(beam_width=2)):
        with pytest.raises(RequestError, match=r"params is a .*others go to generate"):
            llm.stream("a", params)  # type: ignore[arg-type]


def test_arrays_and_generators_are_prompts(llm: LLM) -> None:
    ids = [5, 17, 9]
    wanted = llm.generate(ids, GREEDY)[0].outputs[0].token_ids
    forms = (np.array(ids), torch.tensor(ids), list(np.array(ids)), np.array([ids]), [torch.tensor(ids)], iter([ids]))
    for form in forms:
        assert [output.outputs[0].token_ids for output in llm.generate(form, GREEDY)] == [wanted]  # type: ignore[arg-type]


def test_a_cached_engine_that_was_damaged_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    TABLE.load("cpu")
    regions = env.cache_dir() / "regions"
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path))
    if regions.is_dir():
        shutil.copytree(regions, tmp_path / "regions")
    settings = {"dtype": "float32", "kv_cache_memory": 64 << 20, "max_num_seqs": 4}
    with LLM(**settings) as fresh:
        wanted = fresh.chat(ask("What is 17 + 25?"), GREEDY)[0].outputs[0].text
    (directory,) = (tmp_path / "engines").iterdir()
    for name in ("network.txt", "engine.json"):
        (directory / name).write_text((directory / name).read_text().replace("a", "b", 1))
        with pytest.warns(EngineryWarning, match=r"it is built again"), LLM(**settings) as again:
            assert again.chat(ask("What is 17 + 25?"), GREEDY)[0].outputs[0].text == wanted
    (directory / "engine.json").unlink()
    LLM(**settings).close()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("chat_template.jinja", "{% if %}", "model: the chat template cannot be compiled"),
        ("generation_config.json", '{"do_sample": true, "top_k": 50.0}', "generation_config.json: top_k=50.0"),
    ],
)
def test_what_an_engine_carries_is_checked_before_it_is_built(
    tmp_path: Path, name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).write_text(text)
    monkeypatch.setattr(enginery.llm, "import_network", lambda *_: pytest.fail("it was imported"))
    with pytest.raises(CheckpointError, match=words):
        enginery.llm.build(tmp_path / "model", output=tmp_path / "engine")


def test_seeded_samples_do_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=7, max_tokens=16, n=3)
    alone = llm.generate("The ", params)[0]
    beside = llm.generate(["1, 2,", "The ", "Sort"], [GREEDY, params, GREEDY])[1]
    assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in beside.outputs]
    assert len({tuple(c.token_ids) for c in alone.outputs}) > 1


def test_beam_search_beats_greedy(llm: LLM) -> None:
    greedy = llm.generate("The word ", SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True))[0]
    beams = llm.generate("The word ", BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True))[0]
    assert len(beams.outputs) == 4
    best, former = beams.outputs[0].cumulative_logprob, greedy.outputs[0].cumulative_logprob
    assert best is not None
    assert former is not None
    assert best >= former - 1e-4


def test_a_bad_prompt_among_good_ones_runs_none_and_loses_nothing(llm: LLM) -> None:
    good = {"prompt_token_ids": [5, 6, 7]}
    for bad, words in (
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [5, 10**9]}, "out of range"),
        ({"prompt_token_ids": [5, True]}, "integer"),
        ({"prompt_token_ids": [5] * 5000}, "maximum context length"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate([good, bad], GREEDY)
        assert llm.metrics().num_running == llm.metrics().num_waiting == 0
    with pytest.raises(UsageError, match="2 params for 1 prompts"):
        llm.generate([good], [GREEDY, GREEDY])
    assert llm.chat(ask("What is 17 + 25?"), GREEDY)[0].outputs[0].text == "42"


def test_the_compiled_engine_answers_the_same(llm: LLM) -> None:
    with LLM(dtype="float32", kv_cache_memory=64 << 20, max_num_seqs=16) as compiled:
        wanted = [output.outputs[0].token_ids for output in llm.chat([ask(text) for text in QUESTIONS], GREEDY)]
        found = [output.outputs[0].token_ids for output in compiled.chat([ask(text) for text in QUESTIONS], GREEDY)]
        assert found == wanted
        assert compiled.engine.backend == "compiled"


def test_logprobs_are_the_same_bits_alone_in_a_batch_and_in_any_chunks() -> None:
    generator = random.Random(0)
    lengths = (40, 7, 90, 33, 61, 5)
    prompts = [{"prompt_token_ids": [generator.randrange(3, 1000) for _ in range(length)]} for length in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)
    found = []
    for chunk in (512, 24):
        settings = {"kv_cache_memory": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": chunk}
        with LLM(dtype="float32", prefix_caching=False, **settings) as llm:
            found.append([llm.generate(prompt, params)[0].outputs[0].logprobs for prompt in prompts])
            found.append([output.outputs[0].logprobs for output in llm.generate(prompts, params)])
    assert all(logprobs == found[0] for logprobs in found[1:])
