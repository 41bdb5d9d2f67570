"""Host time per step at 64 running requests: what a step costs besides the engine.

    python benchmarks/host_step.py            # table and one JSON line
    python benchmarks/host_step.py --write    # also benchmarks/results/host_step.json

The engine returns ready logits over a vocabulary of 32000, of a shape that language models give (Zipf over a random
order of the tokens, plus noise); its own time is not counted. Medians over the decode steps, and the least total, in
milliseconds; sampling runs on the CPU, one thread, without a tokenizer (token-only) unless the row says otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.runtime.sampling_params import SamplingParams
from enginery.runtime.session import Session, SessionConfig
from record import record

VOCABULARY = 32000
REQUESTS = 64
PHASES = ("schedule", "batch", "sample", "settle")


class ReadyEngine:
    """Hands out one of a few prepared batches of logits."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.is_asynchronous = False
        generator = torch.Generator().manual_seed(0)
        ranks = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(2 * REQUESTS)])
        noise = torch.randn(ranks.shape, generator=generator)
        self._ready = -1.5 * (ranks + 1.0).log() + noise
        self._steps = 0

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        self._steps += 1
        rows = (torch.arange(len(inputs.logits_indices)) + self._steps) % len(self._ready)
        return self._ready[rows]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        pass


def mixed(index: int) -> SamplingParams:
    """A traffic of six kinds of request in equal shares."""
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=50),
        SamplingParams(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.0, logit_bias={7: -100.0}, presence_penalty=0.5),
    )
    return kinds[index % len(kinds)]


def measure(make_params, steps: int) -> dict[str, float]:
    limits = EngineLimits(VOCABULARY, 2048, 8192, REQUESTS, REQUESTS * 128)
    session = Session(ReadyEngine(limits), config=SessionConfig(seed=0))
    generator = random.Random(0)
    for index in range(REQUESTS):
        prompt = [generator.randrange(VOCABULARY) for _ in range(generator.randint(64, 512))]
        params = make_params(index)
        wanted = {name: getattr(params, name) for name in params.__dataclass_fields__}
        session.add(prompt, SamplingParams(**{**wanted, "max_tokens": None, "ignore_eos": True}))
    while session.stats().num_generated_tokens < 4 * REQUESTS:
        session.step()
    samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
    samples["total"] = []
    for _ in range(steps):
        before = session.stats()
        session.step()
        after = session.stats()
        times = [getattr(after, f"{phase}_seconds") - getattr(before, f"{phase}_seconds") for phase in PHASES]
        for name, value in zip((*PHASES, "total"), (*times, sum(times)), strict=True):
            samples[name].append(value * 1e3)
    row = {f"{name}, ms": round(statistics.median(values), 4) for name, values in samples.items()}
    return {**row, "least total, ms": round(min(samples["total"]), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "greedy": measure(lambda index: SamplingParams(temperature=0.0), options.steps),
        "top_k 50": measure(lambda index: SamplingParams(top_k=50), options.steps),
        "top_p 0.9": measure(lambda index: SamplingParams(top_p=0.9), options.steps),
        "temperature 1": measure(lambda index: SamplingParams(), options.steps),
        "mixed": measure(mixed, options.steps),
    }
    record("host_step", results, write=options.write)


if __name__ == "__main__":
    main()
