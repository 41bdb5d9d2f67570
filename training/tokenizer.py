"""The tokenizer: byte-level BPE learned from the questions themselves, digits one by one, and a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tasks import TASKS, draw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024

# ", " is one piece, so that the items of a list are the same tokens wherever they stand; a digit is always alone, so
# that arithmetic sees places and not arbitrary groups.
PIECES = r", |\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def texts(seed: int, count: int) -> Iterator[str]:
    """Prompts and answers to learn merges from. Answers given letter by letter would teach merges that nothing uses."""
    rng = random.Random(f"tokenizer/{seed}")
    weights = [weight for _, weight in TASKS.values()]
    for task in rng.choices(list(TASKS), weights, k=count):
        problem = draw(task, rng)
        yield from ("user", "assistant")
        yield problem.prompt.lower() if task == "change_case" else problem.prompt
        if not problem.spelled:
            yield problem.answer


def train_tokenizer(seed: int, count: int = 60_000) -> Tokenizer:
    """The same tokenizer for the same seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, count), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers reads them."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
