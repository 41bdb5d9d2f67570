"""Host time per step: what a step of decoding costs besides the engine.

    python benchmarks/host_step.py            # table and one JSON line
    python benchmarks/host_step.py --write    # also benchmarks/results/host_step.json

The engine returns ready logits, of a shape that language models give (Zipf over a random order of the tokens, plus
noise); its own time is not counted. Medians over the decode steps, and the least total, in milliseconds, one thread,
without a tokenizer; `total` is the whole of `Session.step` but the engine, a little more than its parts.

- overlapped, 256: greedy requests in the loop of a GPU, over a vocabulary of 128, so that `sample` is what the host
  does beside the device; outputs at the end, or streamed token by token.
- 64: the plain loop of a CPU, which samples on the CPU from a vocabulary of 32000.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.runtime.sampling_params import RequestOutputKind, SamplingParams
from enginery.runtime.session import Session, SessionConfig
from record import record

PHASES = ("schedule", "batch", "sample", "settle")


class ReadyEngine:
    """Hands out one of a few prepared batches of logits."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.is_asynchronous = False
        generator = torch.Generator().manual_seed(0)
        count, size = 2 * limits.max_num_seqs, limits.vocab_size
        ranks = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])
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


def measure(
    make_params, steps: int, *, requests: int = 64, vocabulary: int = 32000, overlap: bool = False
) -> dict[str, float]:
    limits = EngineLimits(vocabulary, 2048, 8192, requests, requests * 128)
    session = Session(ReadyEngine(limits), config=SessionConfig(seed=0, overlap=overlap))
    generator = random.Random(0)
    for index in range(requests):
        prompt = [generator.randrange(vocabulary) for _ in range(generator.randint(64, 512))]
        session.add(prompt, replace(make_params(index), max_tokens=None, ignore_eos=True))
    while session.stats().num_generated_tokens < 4 * requests or session.stats().num_waiting:
        session.step()
    samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
    samples["total"] = []
    for _ in range(steps):
        before = session.stats()
        began = time.perf_counter()
        session.step()
        took = time.perf_counter() - began
        after = session.stats()
        for phase in PHASES:
            name = f"{phase}_seconds"
            samples[phase].append(1e3 * (getattr(after, name) - getattr(before, name)))
        samples["total"].append(1e3 * (took - (after.engine_seconds - before.engine_seconds)))
    row = {f"{name}, ms": round(statistics.median(values), 4) for name, values in samples.items()}
    return {**row, "least total, ms": round(min(samples["total"]), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    greedy = SamplingParams(temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY)
    streamed = replace(greedy, output_kind=RequestOutputKind.DELTA)
    device = {"requests": 256, "vocabulary": 128, "overlap": True}
    results = {
        "overlapped, 256 greedy": measure(lambda index: greedy, options.steps, **device),
        "overlapped, 256 streamed": measure(lambda index: streamed, options.steps, **device),
        "64 greedy": measure(lambda index: greedy, options.steps),
        "64 top_k 50": measure(lambda index: SamplingParams(top_k=50), options.steps),
        "64 top_p 0.9": measure(lambda index: SamplingParams(top_p=0.9), options.steps),
        "64 temperature 1": measure(lambda index: SamplingParams(), options.steps),
        "64 mixed": measure(mixed, options.steps),
    }
    record("host_step", results, write=options.write)


if __name__ == "__main__":
    main()
