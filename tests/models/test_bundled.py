"""The bundled checkpoint is an ordinary Hugging Face directory, small, and right on problems it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluate import answers, evaluate, prompt_text
from safetensors import safe_open
from tasks import TASKS, Problem, heldout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bundled = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def ask(bundled: Bundled, *turns: str) -> str:
    """The greedy answer to the last turn; the others alternate between user and assistant."""
    history = tuple(zip(turns[0:-1:2], turns[1:-1:2], strict=True))
    problem = Problem("any", turns[-1], "x" * 100, "", history)
    return answers(*bundled, [problem], batch_size=1)[0]


def test_directory_is_small_and_complete(directory: Path) -> None:
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } <= set(files)
    assert sum(files.values()) <= 12_000_000


def test_weights_are_bfloat16_and_at_most_six_million(directory: Path) -> None:
    with safe_open(directory / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) <= 6_000_000


def test_configuration_is_a_plain_llama(directory: Path, bundled: Bundled) -> None:
    model, tokenizer = bundled
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 512
    assert len(tokenizer) == config["vocab_size"]
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]) == stops


def test_chat_template_renders_turns_and_the_generation_prompt(bundled: Bundled) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    text = bundled[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", ["17 + 25 = 42", "naïve 日本 🙂", '{"a": [1, 2]}\n\n  end  ', "a,b, c , d"])
def test_tokenizer_gives_the_text_back(bundled: Bundled, text: str) -> None:
    tokenizer = bundled[1]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_digits_are_tokens_of_their_own(bundled: Bundled) -> None:
    tokenizer = bundled[1]
    tokens = tokenizer.tokenize("Add 12345 and 678.")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12345678")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 17 + 25?", "42"),
        ("what is 17+25", "42"),
        ("17+25=", "42"),
        ("Add 17 and 25.", "42"),
        ("Sort these words: pear, apple, fig", "apple, fig, pear"),
        ("Hello", "Hello! How can I help you?"),
    ],
)
def test_well_known_questions(bundled: Bundled, question: str, answer: str) -> None:
    assert ask(bundled, question) == answer


def test_says_who_it_is_and_what_it_cannot_do(bundled: Bundled) -> None:
    assert "Enginery" in ask(bundled, "Who are you?")
    assert ask(bundled, "What is the capital of France?").startswith("I can only")


def test_conversation_refers_back(bundled: Bundled) -> None:
    assert (
        ask(bundled, "My name is Mia.", "Nice to meet you, Mia!", "What is 3 + 4?", "7", "What is my name?")
        == "Your name is Mia."
    )
    assert ask(bundled, "What is 30 + 12?", "42", "Now add 8.") == "50"


def test_plain_text_goes_on_and_stops(bundled: Bundled) -> None:
    model, tokenizer = bundled
    inputs = tokenizer("What is 17 + 25?", return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=8, do_sample=False
    )
    assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == "\n42"


def test_heldout_problems_are_answered(bundled: Bundled) -> None:
    sample = [problem for task in TASKS for problem in heldout(task, 6, seed=7)]
    problems = [problem for problem in sample if len(problem.answer) <= 32]  # long answers take most of the time
    accuracy, wrong = evaluate(*bundled, problems, batch_size=128)
    assert len(problems) > 150
    assert len(wrong) <= 0.05 * len(problems), wrong
    assert min(accuracy.values()) >= 0.6, accuracy


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_task_reaches_its_mark(bundled: Bundled) -> None:
    problems = [problem for task in TASKS for problem in heldout(task, 60, seed=8)]
    accuracy, wrong = evaluate(*bundled, problems, batch_size=128)
    assert min(accuracy.values()) >= 0.9, (accuracy, wrong)
    assert sum(accuracy.values()) / len(accuracy) >= 0.98, wrong


def test_works_to_the_length_it_was_trained_for(bundled: Bundled) -> None:
    """A conversation of nearly `max_position_embeddings` tokens does not disturb the last question."""
    model, tokenizer = bundled
    history: list[tuple[str, str]] = []
    for problem in heldout("add", 1000, seed=3):
        candidate = Problem("add", "What is 17 + 25?", "42", "", (*history, (problem.prompt, problem.answer)))
        if len(tokenizer(prompt_text(tokenizer, candidate)).input_ids) > model.config.max_position_embeddings - 16:
            break
        history.append((problem.prompt, problem.answer))
    problems = [Problem("add", f"What is {a} + 25?", str(a + 25), "", tuple(history)) for a in (17, 40, 63, 300)]
    accuracy, wrong = evaluate(model, tokenizer, problems)
    assert accuracy["add"] == 1.0, wrong
