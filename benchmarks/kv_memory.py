"""How well the KV memory is used: waste, and blocks saved by sharing, as the PagedAttention paper defines them.

    python benchmarks/kv_memory.py            # table and one JSON line
    python benchmarks/kv_memory.py --write    # also benchmarks/results/kv_memory.json

Counted, not timed: the real session on the fake engine, blocks of 16 tokens.
- waste: token slots of used blocks that hold nothing / all slots of used blocks, averaged over the steps. Lengths of
  prompt and output together are lognormal with mean 300.
- sharing: 1 - blocks used / blocks used if none were shared, summed over the steps (arXiv 2309.06180, section 6.3).
  Lengths are lognormal with the means of the paper's datasets: Alpaca 19 in, 58 out; ShareGPT 161 in, 338 out. The
  prefix cache is off, so that only sharing within a request counts. The fake engine's logits are random; how beams
  branch, and with it the beam figures, depends on them.
"""

from __future__ import annotations

import argparse
import math
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")

from enginery.engine.protocol import EngineLimits
from enginery.runtime.fake_engine import FakeEngine
from enginery.runtime.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from enginery.runtime.session import Session, SessionConfig
from record import record

VOCABULARY = 64
LONGEST = 2048
DATASETS = {"Alpaca": (19, 58), "ShareGPT": (161, 338)}
PAPER = {
    ("Alpaca", "parallel"): "6.1-9.8", ("ShareGPT", "parallel"): "16.2-30.5",
    ("Alpaca", "beam"): "37.6-55.2", ("ShareGPT", "beam"): "44.3-66.3",
}  # fmt: skip


def lognormal(rng: random.Random, mean: float, sigma: float = 0.8) -> int:
    drawn = rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
    return max(1, min(LONGEST // 2 - 1, round(drawn)))


def session_of(num_running: int) -> Session:
    limits = EngineLimits(VOCABULARY, LONGEST, 4096, num_running, num_running * LONGEST // 16)
    return Session(FakeEngine(limits), config=SessionConfig(prefix_caching=False, seed=0))


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def waste(num_requests: int) -> float:
    """Mean part of the used memory that is empty, in percent."""
    rng = random.Random(0)
    session = session_of(64)
    for _ in range(num_requests):
        total = max(2, lognormal(rng, 300))
        num_prompt = max(1, int(total * rng.random()))
        params = SamplingParams(
            max_tokens=max(1, total - num_prompt), ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        session.add(prompt_of(rng, num_prompt), params)
    wasted = []
    while session.has_work:
        session.step()
        stats = session.stats()
        if stats.num_used_blocks:
            wasted.append(stats.kv_waste)
    return 100 * sum(wasted) / len(wasted)


def sharing(mean_in: int, mean_out: int, method: str, width: int, num_requests: int) -> float:
    """Blocks saved by sharing, in percent of those that would be used without it."""
    rng = random.Random(1)
    session = session_of(8 * width)
    for _ in range(num_requests):
        num_prompt, num_output = lognormal(rng, mean_in), lognormal(rng, mean_out)
        if method == "beam":
            session.add(prompt_of(rng, num_prompt), BeamSearchParams(width, num_output))
        else:
            kind = RequestOutputKind.FINAL_ONLY
            params = SamplingParams(n=width, max_tokens=num_output, ignore_eos=True, output_kind=kind)
            session.add(prompt_of(rng, num_prompt), params)
    used = referenced = 0
    while session.has_work:
        session.step()
        stats = session.stats()
        used += stats.num_used_blocks
        referenced += stats.num_referenced_blocks
    return 100 * (1 - used / referenced)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48, help="requests of each sharing measurement")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    options = parser.parse_args()
    results: dict[str, dict[str, object]] = {"waste, mean length 300": {"%": round(waste(4 * options.requests), 2)}}
    for dataset, (mean_in, mean_out) in DATASETS.items():
        for method in ("parallel", "beam"):
            row = results[f"saved by sharing, {dataset}, {method}"] = {}
            for width in (2, 4, 6):
                row[f"{width}, %"] = round(sharing(mean_in, mean_out, method, width, options.requests), 1)
            row["paper 2-6, %"] = PAPER[dataset, method]
    record("kv_memory", results, write=options.write)


if __name__ == "__main__":
    main()
