"""Accuracy of a checkpoint per task, on held-out problems, by greedy decoding through transformers.

python training/evaluate.py src/enginery/models/enginery-6m --count 200
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from tasks import TASKS, Problem, check, heldout
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def prompt_text(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    """What the model reads: the rendered chat, or the bare prompt of a plain problem."""
    if problem.plain:
        return problem.prompt
    return tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], batch_size: int
) -> list[str]:
    """Greedy answers. Problems of similar length go together; a batch stops a little after its longest true answer."""
    length = [
        len(p.answer) if p.spelled else len(tokenizer(p.answer, add_special_tokens=False).input_ids) for p in problems
    ]
    order = sorted(range(len(problems)), key=lambda i: length[i])
    result = [""] * len(problems)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = [prompt_text(tokenizer, problems[i]) for i in chosen]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        inputs = inputs.to(model.device)
        budget = 8 + max(length[i] for i in chosen)
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=budget, do_sample=False
        )
        said = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, said, strict=True):
            result[i] = text
    return result


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], batch_size: int = 512
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Share of right answers per task, and the wrong ones."""
    right: dict[str, list[bool]] = {}
    wrong = []
    for problem, said in zip(problems, answers(model, tokenizer, problems, batch_size), strict=True):
        good = check(problem, said)
        right.setdefault(problem.task, []).append(good)
        if not good:
            wrong.append({"task": problem.task, "prompt": problem.prompt, "answer": problem.answer, "said": said})
    return {task: sum(marks) / len(marks) for task, marks in right.items()}, wrong


def evaluate_checkpoint(
    directory: Path, count: int, seed: int, device: str, batch_size: int = 512
) -> dict[str, object]:
    """The report that goes into accuracy.json: bfloat16 weights as saved, `count` held-out problems a task."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device).eval()
    problems = [problem for task in TASKS for problem in heldout(task, count, seed)]
    began = time.perf_counter()
    accuracy, wrong = evaluate(model, tokenizer, problems, batch_size)
    return {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "mean": sum(accuracy.values()) / len(accuracy),
        "accuracy": accuracy,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=200, help="held-out problems per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the whole report, wrong answers included, as JSON")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    report = evaluate_checkpoint(arguments.checkpoint, arguments.count, arguments.seed, arguments.device)
    for task, share in report["accuracy"].items():
        print(f"{task:16} {share:7.1%}")
    print(f"{'mean':16} {report['mean']:7.1%}   {report['seconds']} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
