"""Building an engine at 4 and 24 layers of one width: time by stage, peak memory, and the second start.

    python benchmarks/build.py                  # table and one JSON line
    python benchmarks/build.py --layers 4 24 --write

Each build runs in a process of its own with an empty cache of compiled regions; the C++ kernels, which are compiled
once for a machine, are compiled before. Stages overlap: the compilers run while the weights are bound.
- import: the packages; frontend: checkpoint to network; rewrite: all rules; lower: Python's part of the compilation;
  bind: weights; compile: what the C++ compilers took longer than that.
- CPU: processor time of the process and of the compilers; half of it is what two free cores would need at least.
- peak: the process's resident memory, of which `anonymous` is not the page cache of mapped files.
- again: the same build where nothing but what all regions share has been compiled before, as for another model.
- start: from the start of a process to the first new token of a prompt of 32 tokens, from the built engine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from record import record

BUILD, START = "--run-build", "--run-start"


def run_build(checkpoint: Path, output: Path) -> dict[str, Any]:
    """In a process of its own."""
    clock = Clock()
    with Anonymous() as memory:
        import torch  # noqa: F401

        import enginery.llm
        from enginery.kernels.table import TABLE

        TABLE.load("cpu")
        clock.mark("import")
        os.environ["ENGINERY_CACHE"] = str(output.parent / "cache")
        engine = enginery.llm.build(checkpoint, output=output, device="cpu", max_num_seqs=32, progress=clock.event)
        clock.mark("open")
    weights = engine.plan.weights
    return {
        "seconds": clock.total(),
        "stages": clock.stages,
        "cpu": sum(os.times()[:4]),
        "regions": len(engine.regions.distinct),
        "weights": weights,
        "peak": memory.resident_peak,
        "anonymous": memory.peak,
    }


class Clock:
    """Seconds of each stage, from the events of a build."""

    NAMES = ("frontend", "rewrite", "compile", "bind")
    ENDS = {"rewrite": "frontend", "compile": "rewrite", "bind": "lower"}  # noqa: RUF012
    """A stage's first event ends the stage before it."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.stages: dict[str, float] = {}
        self.seen: set[str] = set()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now

    def event(self, stage: str, done: int, total: int) -> None:
        if stage not in self.seen:
            self.seen.add(stage)
            self.mark(self.ENDS.get(stage, "write"))
        elif stage == "bind" and done == total:
            self.mark("bind")
        elif stage == "compile" and done == total:
            self.mark("compile")

    def total(self) -> float:
        return sum(self.stages.values())


class Anonymous:
    """Samples the anonymous resident memory of this process."""

    def __enter__(self) -> Anonymous:
        self.peak = self.resident_peak = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.stop.wait(0.02):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, int(status["RssAnon"].split()[0]) << 10)
            self.resident_peak = int(status["VmHWM"].split()[0]) << 10


def run_start(engine: Path) -> dict[str, Any]:
    """In a process of its own; the time before Python ran is added by the caller."""
    begin = time.perf_counter()
    from enginery.llm import LLM
    from enginery.runtime.sampling_params import SamplingParams

    imported = time.perf_counter()
    llm = LLM(engine, max_num_seqs=32)
    loaded = time.perf_counter()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": list(range(3, 35))}], params)
    answered = time.perf_counter()
    return {"import": imported - begin, "load": loaded - imported, "first step": answered - loaded, "at": time.time()}


def in_process(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    finished = subprocess.run(
        command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def measure(layers: int, repetitions: int) -> dict[str, Any]:
    from models import random_llama

    checkpoint = random_llama(layers)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        engine = Path(scratch) / "engine"
        build = in_process(BUILD, str(checkpoint), str(engine))
        for region in Path(scratch, "cache").rglob("*.pt2"):
            region.unlink()
        again = in_process(BUILD, str(checkpoint), str(engine))
        cache = {"ENGINERY_CACHE": str(Path(scratch) / "cache")}
        kernels = Path(os.environ.get("ENGINERY_CACHE", "~/.cache/enginery")).expanduser() / "kernels"
        if kernels.is_dir():
            shutil.copytree(kernels, Path(scratch) / "cache" / "kernels")
        starts = []
        for _ in range(repetitions):
            begin = time.time()
            start = in_process(START, str(engine), environment=cache)
            starts.append({**start, "seconds": start.pop("at") - begin})
        start = min(starts, key=lambda start: start["seconds"])
    return {"build": build, "again": again["seconds"], "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results = {f"{layers} layers": measure(layers, options.repetitions) for layers in options.layers}
    table = {
        name: {
            "build, s": result["build"]["seconds"],
            "CPU, s": result["build"]["cpu"],
            **result["build"]["stages"],
            "again, s": result["again"],
            "weights, GiB": result["build"]["weights"] / 2**30,
            "peak, GiB": result["build"]["peak"] / 2**30,
            "anonymous": result["build"]["anonymous"] / 2**30,
            "start, s": result["start"]["seconds"],
            "load": result["start"]["load"],
        }
        for name, result in results.items()
    }
    record("build", results, table=table, write=options.write)


if __name__ == "__main__":
    if BUILD in sys.argv:
        print(json.dumps(run_build(Path(sys.argv[-2]), Path(sys.argv[-1]))))
    elif START in sys.argv:
        print(json.dumps(run_start(Path(sys.argv[-1]))))
    else:
        main()
