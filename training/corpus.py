"""Training text: problems written as chats or plain text, tokenised, packed into rows, made ahead by worker processes.

A row is `length + 1` tokens of uint16. The top bit (`TRAINED`) marks the tokens that the model must learn to say; the
others are the user's part. Step `n` of seed `s` is the same rows on any machine with any number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import string
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tasks import TASKS, Problem, draw, word
from tokenizers import Tokenizer

TRAINED = 0x8000
SYSTEM = (
    "You are a helpful assistant.", "You are Enginery's bundled model.", "Answer briefly.",
    "You are a small language model.", "Be concise.",
    "You answer small questions about numbers, words, lists and JSON.", "You are a helpful, precise assistant.",
    "Give short answers.", "Always be polite.", "Think before you answer.", "Answer the user's question.",
    "Do not explain.", "You are a careful calculator.", "Answer in English.", "The user is in a hurry.", "Be correct.",
)  # fmt: skip
_NAMES = list(TASKS)
_WEIGHTS = [weight for _, weight in TASKS.values()]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a document. `spelled` text is tokenised letter by letter, which is how the model says it."""

    text: str
    trained: bool = False
    spelled: bool = False


def plain_document(problem: Problem, rng: random.Random) -> list[Segment]:
    """The prompt and its continuation as running text; counting goes on far beyond the answer that a check asks for."""
    prompt, answer = problem.prompt, problem.answer
    if problem.task == "plain_count":
        *_, before, last = map(int, answer.removeprefix(", ").split(", "))
        more = rng.randint(16, 60)
        answer += "".join(f", {last + i * (last - before)}" for i in range(1, more))
        joint = " " if prompt.endswith(",") else ""
    else:
        joint = " " if prompt.endswith(("A:", " =")) else "" if prompt.endswith("=") else "\n"
    return [
        Segment(prompt),
        Segment(joint, trained=True),
        Segment(answer, trained=True, spelled=problem.spelled),
        Segment("<|endoftext|>", trained=True),
    ]


def system_prompt(rng: random.Random) -> str:
    """A few sentences, or notes that no answer depends on."""
    if rng.random() < 0.8:
        return " ".join(rng.sample(SYSTEM, rng.randint(1, 3)))
    return f"{rng.choice(SYSTEM)} Notes: {' '.join(word(rng) for _ in range(rng.randint(3, 50)))}."


def chat_document(problems: Sequence[Problem], rng: random.Random) -> list[Segment]:
    """A conversation as the chat template renders it."""
    segments = []
    lead = ""
    if rng.random() < 0.15:
        lead = f"<|im_start|>system\n{system_prompt(rng)}<|im_end|>\n"
    for problem in problems:
        turns = [(prompt, answer, False) for prompt, answer in problem.history]
        for prompt, answer, spelled in [*turns, (problem.prompt, problem.answer, problem.spelled)]:
            segments.append(Segment(f"{lead}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"))
            segments.append(Segment(answer, trained=True, spelled=spelled))
            segments.append(Segment("<|im_end|>", trained=True))
            lead = "\n"
    segments.append(Segment("\n<|endoftext|>"))
    return segments


def documents(rng: random.Random, count: int, max_turns: int) -> Iterator[list[Segment]]:
    """Random documents; three of ten chats have more than one turn."""
    for task in rng.choices(_NAMES, _WEIGHTS, k=count):
        problem = draw(task, rng)
        if problem.plain:
            yield plain_document(problem, rng)
            continue
        problems = [problem]
        if rng.random() < 0.3:
            more = rng.choices(_NAMES, _WEIGHTS, k=rng.randint(1, max_turns - 1))
            problems += [p for p in (draw(task, rng) for task in more) if not p.plain]
        yield chat_document(problems, rng)


class Packer:
    """Makes the rows of a step."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer = tokenizer
        self.seed = seed
        self.letters = {c: tokenizer.encode(c).ids for c in string.ascii_letters + "- "}

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Token ids of every segment, with the mark of the trained ones."""
        encodings = self.tokenizer.encode_batch_fast([s.text for s in segments], add_special_tokens=False)
        result = []
        for segment, encoding in zip(segments, encodings, strict=True):
            ids = [i for c in segment.text for i in self.letters[c]] if segment.spelled else encoding.ids
            result.append([i | TRAINED for i in ids] if segment.trained else ids)
        return result

    def rows(self, step: int, count: int, length: int) -> NDArray[np.uint16]:
        """(count, length + 1). Every row begins with a new document; the last one of a row may be cut off.

        A document that is cut off begins the next row again, whole: no answer is asked for without its question.
        """
        rng = random.Random(f"{self.seed}/{step}")
        table = np.empty((count, length + 1), dtype=np.uint16)
        row: list[int] = []
        filled = 0
        while True:
            batch = list(documents(rng, 256, max_turns=4 if length < 512 else 12))
            encoded = iter(self.encode([segment for document in batch for segment in document]))
            for document in batch:
                ids = [i for _ in document for i in next(encoded)]
                row += ids
                if len(row) > length:
                    table[filled] = row[: length + 1]
                    filled += 1
                    row = ids if len(row) > length + 1 and len(ids) <= length else []
                    if filled == count:
                        return table


def stream(packer: Packer, plan: Sequence[tuple[int, int]], workers: int) -> Iterator[NDArray[np.uint16]]:
    """The rows of every step in order; `plan[step]` = (rows, length). Only a few steps per worker are made ahead."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = deque()
        for step, (count, length) in enumerate(plan):
            waiting.append(pool.apply_async(packer.rows, (step, count, length)))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()
