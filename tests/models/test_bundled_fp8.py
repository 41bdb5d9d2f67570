"""The bundled model answers its tasks in 8-bit floats as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tasks import TASKS, Problem, check, heldout

from enginery import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(quantization="fp8", backend="eager", kv_cache_memory=64 << 20, max_num_seqs=64, device="cpu") as model:
        yield model


def answers(llm: LLM, problems: list[Problem]) -> list[str]:
    assert llm.tokenizer is not None
    prompts = [
        {"prompt": problem.prompt}
        if problem.plain
        else {"prompt_token_ids": llm.tokenizer.apply_chat_template(problem.messages)}
        for problem in problems
    ]
    return [output.outputs[0].text for output in llm.generate(prompts, GREEDY)]


def test_heldout_problems_are_answered(llm: LLM) -> None:
    sample = [problem for task in TASKS for problem in heldout(task, 3, seed=11)]
    problems = [problem for problem in sample if len(problem.answer) <= 32]
    right = [check(problem, said) for problem, said in zip(problems, answers(llm, problems), strict=True)]
    assert len(problems) > 75
    assert sum(right) >= 0.93 * len(right)
    assert llm.engine.manifest.config["quantization"] == "fp8"
    counts = {name: count for phase in llm.engine.summary()["phases"] for name, count in phase["rules"].items()}
    assert counts["QuantiseLinears"] == 4 * llm.engine.facts.num_layers
