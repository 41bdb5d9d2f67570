"""The tools that made the bundled model: the split, the corpus and the decoder."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import TRAINED, Packer
from model import Llama, llama_config
from tasks import TASKS, Problem, check, draw, heldout, is_heldout
from tokenizer import VOCABULARY, train_tokenizer
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

Bundled = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_a_heldout_problem(task: str) -> None:
    rng = random.Random(11)
    trained = [draw(task, rng) for _ in range(2000)]
    held = heldout(task, 200, seed=5)
    assert not {problem.key for problem in trained} & {problem.key for problem in held}
    assert not {(p.history, p.prompt) for p in trained} & {(p.history, p.prompt) for p in held}
    assert all(is_heldout(problem.key) for problem in held)


def test_the_famous_sum_is_heldout() -> None:
    assert is_heldout("add 17 25")


def test_heldout_is_the_same_for_the_same_seed() -> None:
    assert heldout("json_field", 30, seed=1) == heldout("json_field", 30, seed=1)
    assert heldout("json_field", 30, seed=1) != heldout("json_field", 30, seed=2)


def test_answers_are_true() -> None:
    """Where the prompt is an equation or a list, its answer is found again another way."""
    rng = random.Random(3)
    for _ in range(300):
        a, b = heldout("add", 1, rng.random())[0].key.split()[1:]
        problem = draw("sort_numbers", rng)
        numbers = [int(item) for item in problem.answer.split(", ")]
        assert numbers in (sorted(numbers), sorted(numbers, reverse=True))
        assert int(a) <= int(b)
        problem = draw("reverse_word", rng)
        assert problem.answer[::-1] in problem.prompt
        problem = draw("subtract", rng)
        minuend, subtrahend = map(int, problem.key.split()[1:])
        assert int(problem.answer) == minuend - subtrahend


def test_check_wants_the_whole_answer() -> None:
    closed = Problem("add", "1 + 1", "2", "")
    assert check(closed, " 2\n")
    assert not check(closed, "20")
    endless = Problem("plain_count", "1, 2,", "3, 4", "", plain=True, endless=True)
    assert check(endless, " 3, 4, 5, 6")
    assert not check(endless, " 3, 45, 6")


def test_rows_begin_with_a_document_and_mark_what_is_learned(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    packer = Packer(tokenizer, seed=1)
    rows = packer.rows(step=4, count=24, length=256)
    assert rows.shape == (24, 257)
    assert np.array_equal(rows, packer.rows(step=4, count=24, length=256))
    assert not np.array_equal(rows, packer.rows(step=5, count=24, length=256))
    tokens = rows & (TRAINED - 1)
    assert tokens.max() < VOCABULARY
    assert 0.1 < (rows >= TRAINED).mean() < 0.4
    ends = rows[tokens == tokenizer.token_to_id("<|im_end|>")] >= TRAINED
    assert 0.3 < ends.mean() < 0.7  # the model's turns end by its own word, the user's do not


def test_tokenizer_is_reproducible(bundled: Bundled) -> None:
    assert train_tokenizer(0).get_vocab() == bundled[1].get_vocab()


def test_decoder_computes_what_transformers_computes() -> None:
    torch.manual_seed(0)
    config = llama_config(VOCABULARY, 0, 2)
    network = Llama(config)
    reference = LlamaForCausalLM(config).float().eval()
    reference.load_state_dict(network.state_dict() | {"lm_head.weight": network.model.embed_tokens.weight})
    tokens = torch.randint(0, VOCABULARY, (2, 50))
    with torch.no_grad():
        logits = network.model(tokens, torch.float32) @ network.model.embed_tokens.weight.T
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
        weights = torch.ones(2, 49)
        loss = network.loss(
            network.model(tokens[:, :-1], torch.float32), network.model.embed_tokens.weight, tokens[:, 1:], weights
        )
        torch.testing.assert_close(loss, reference(tokens, labels=tokens).loss, rtol=1e-4, atol=1e-4)
