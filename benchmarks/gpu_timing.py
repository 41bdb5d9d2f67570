"""Times of kernels on a GPU, replayed from a graph, and candidates compiled ahead by several processes."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import torch
import triton

L2_BYTES = 60 << 20

Job = TypeVar("Job")


def seconds(calls: Sequence[Callable], replays: int = 9) -> float:
    """Median time of one call, all of them captured in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[2:])


def read_bandwidth() -> float:
    """TB/s of a reduction that reads 4 GB: the limit of what is bound by the memory."""
    data = torch.ones(1 << 30, device="cuda", dtype=torch.float32)
    return data.numel() * 4 / seconds([data.sum] * 2) / 1e12


def compile_all(run: Callable[[Job], object], jobs: Iterable[Job], workers: int) -> set[Job]:
    """The jobs that compile. `run` does one on little data, which leaves its code in Triton's cache on disk."""
    distinct = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(partial(_failure, run), distinct))
    for failure in filter(None, failures):
        print("does not compile:", failure[:150])
    return {job for job, failure in zip(distinct, failures, strict=True) if not failure}


def _failure(run: Callable[[Job], object], job: Job) -> str:
    try:
        run(job)
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        return f"{job}: {str(error).splitlines()[0]}"
    return ""
