"""Time of the sampler on a device, by kind of request: the host's to launch a step, the device's to run it.

    python benchmarks/sampler.py                       # cuda, 64 rows over a vocabulary of 128256
    python benchmarks/sampler.py --rows 1 --write      # also benchmarks/results/sampler.json
    python benchmarks/sampler.py --device cpu          # the time until the tokens are there, in both columns

Logits have the shape that language models give (Zipf over a random order of the tokens, plus noise). Medians in
milliseconds. The copy of the logits that each step may write to is not counted. The device is kept busy while a step
is launched, so that its time is that of its kernels and not of their launches.

`torch.max` and `greatest` are the first part of every kind, by one reduction and by the operator that the
sampler calls on a device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from enginery.kernels.table import TABLE
from enginery.runtime.batch import SamplingInputs
from enginery.runtime.draws import Draws
from enginery.runtime.sampler import Sampler, Sampling
from record import record

KINDS = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 logprobs": {"temperature": 0.0, "num_logprobs": 5},
    "temperature 0.7": {"temperature": 0.7},
    "min_p 0.05": {"min_p": 0.05},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "top_k 50, top_p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "top_k 1000": {"top_k": 1000},
}
TYPES = {"temperature": np.float32, "top_k": np.int64, "num_logprobs": np.int64}
BUSY_CYCLES = 20_000_000


def inputs(rows: int, settings: dict[str, float]) -> SamplingInputs:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_logprobs": -1} | settings
    columns = {name: np.full(rows, value, TYPES.get(name, np.float64)) for name, value in values.items()}
    return SamplingInputs(rows=None, edits=None, noise=np.random.default_rng(0).random(rows), **columns)


def one_step(logits: torch.Tensor, launch: Callable[[torch.Tensor], object]) -> tuple[float, float]:
    """Milliseconds of the host and of the device."""
    mine = logits.clone()
    if not logits.is_cuda:
        began = time.perf_counter()
        wait_for(launch(mine))
        return ((time.perf_counter() - began) * 1e3,) * 2
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    began = time.perf_counter()
    launched = launch(mine)
    host = time.perf_counter() - began
    end.record()
    wait_for(launched)
    end.synchronize()
    return host * 1e3, start.elapsed_time(end)


def wait_for(launched: object) -> None:
    if isinstance(launched, Sampling):
        launched.wait()


def works(rows: int) -> dict[str, Callable[[torch.Tensor], object]]:
    """What is measured, from logits, by name."""
    batches = {name: inputs(rows, settings) for name, settings in KINDS.items()}
    return {
        "torch.max": lambda logits: logits.max(dim=1),
        "greatest": Draws().greatest,
        **{name: partial(Sampler().sample, inputs=batch) for name, batch in batches.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    options = parser.parse_args()
    TABLE.load(options.device)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(options.vocabulary, generator=generator) for _ in range(options.rows)])
    noise = torch.randn(ranks.shape, generator=generator)
    logits = (-1.5 * (ranks + 1.0).log() + noise).to(options.device)
    results = {}
    for name, launch in works(options.rows).items():
        steps = [one_step(logits, launch) for _ in range(options.steps + 3)][3:]
        host, device = (statistics.median(times) for times in zip(*steps, strict=True))
        results[name] = {"host, ms": round(host, 4), "device, ms": round(device, 4)}
    record("sampler", results, write=options.write)


if __name__ == "__main__":
    main()
