"""One process that opens an engine once and measures arm after arm. What fails is reported and the rest goes on."""

from __future__ import annotations

import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from decoder.job import OPEN, Job, NotAvailable, OutOfTime
from decoder.profile import profiled
from decoder.protocol import ARRIVALS, BARE_START, STARTS, Arm
from decoder.runners import (
    EngineRunner,
    Prompts,
    Runner,
    TransformersRunner,
    VllmRunner,
    build_config,
    built,
    greedy,
    shape_of,
)
from decoder.steps import recorded, summary
from enginery.engine.artifact import is_engine
from enginery.engine.engine import Engine

Result = dict[str, Any]
"""`value` in the unit of the arm, and details"""

OPENING_GROUPS = ("build", *STARTS)
BROKEN_DEVICE = 3
"""exit code: no CUDA call of this process works any more"""
SPARE_STEPS = 64
"""tokens that the first sequences may have while the last ones' prompts are computed"""
_STICKY = ("illegal memory access", "device-side assert", "launch failure", "misaligned address", "ECC error")


def main(job: Job, imports: float) -> int:
    """`imports`: seconds that torch and the package took."""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, job.deadline - time.time()))
    try:
        return _measure_all(job, imports)
    except OutOfTime:
        return 0
    finally:
        job.send({"end": True})


def _out_of_time(*_: object) -> None:
    raise OutOfTime


def _measure_all(job: Job, imports: float) -> int:
    arms = job.arms
    with _reporting(job, _opening(job)) as record:
        opened = _open(job, imports)
        record(opened.result)
    if "failed" in record.message or "skipped" in record.message:
        return 1
    for arm in arms:
        if arm.group in OPENING_GROUPS:
            continue
        if time.time() > job.deadline:
            break
        with _reporting(job, arm.name) as record:
            record(_measure(job, opened.runner, arm))
        if record.is_device_broken:
            return BROKEN_DEVICE
    return 0


def _opening(job: Job) -> str:
    """The arm that opening the engine is."""
    start = next((arm.name for arm in job.arms if arm.group in STARTS), "")
    return start or ("build" if _must_build(job) else OPEN)


def _must_build(job: Job) -> bool:
    return job.engine == "enginery" and ("build" in job.names or not is_engine(Path(job.directory)))


class _Record:
    def __init__(self) -> None:
        self.message: Result = {}
        self.is_device_broken = False

    def __call__(self, result: Result) -> None:
        self.message |= result


@contextmanager
def _reporting(job: Job, name: str) -> Iterator[_Record]:
    """Sends what the block records, or how it failed."""
    record = _Record()
    job.send({"begin": name})
    begin = time.perf_counter()
    try:
        yield record
    except NotAvailable as error:
        record({"skipped": str(error)})
    except OutOfTime:
        job.send({"arm": name, "skipped": "the budget was spent while it ran"})
        raise
    except Exception as error:
        traceback.print_exc()
        record({"failed": _line(error)})
        record.is_device_broken = any(text in str(error) for text in _STICKY)
    record({"took": round(time.perf_counter() - begin, 2)})
    job.send({"arm": name, **record.message})


def _line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {text} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"


# Opening


class _Opened:
    def __init__(self, runner: Runner | None, result: Result) -> None:
        self.runner = runner
        self.result = result


def _open(job: Job, imports: float) -> _Opened:
    groups = {arm.group for arm in job.arms}
    if job.engine == "transformers":
        return _Opened(TransformersRunner(job), {"internal": True})
    if job.engine == "vllm":
        begin = time.perf_counter()
        runner = VllmRunner(job)
        return _Opened(runner, {"value": time.perf_counter() - begin, "unit": "s"})
    if groups & STARTS.keys():
        return _Opened(None, _start(job, imports))
    if _must_build(job):
        engine, stages = built(job)
        return _Opened(EngineRunner(engine), _built_facts(engine, stages.total(), stages.seconds, stages.regions))
    config = build_config(job)
    begin = time.perf_counter()
    engine = Engine.load(job.directory, config)
    return _Opened(EngineRunner(engine), {"internal": True, "value": time.perf_counter() - begin, "unit": "s"})


def _built_facts(engine: Engine, seconds: float, stages: dict[str, float], regions: int) -> Result:
    plan = engine.plan
    sizes = {name: round(getattr(plan, name) / 2**30, 2) for name in ("weights", "activations", "kv_cache")}
    return {"value": seconds, "unit": "s", "stages began at, s": stages, "regions compiled": regions, "GiB": sizes}


def _start(job: Job, imports: float) -> Result:
    """Constructor to ready in this fresh process."""
    begin = time.perf_counter()
    from enginery.llm import LLM

    imports += time.perf_counter() - begin
    config = build_config(job)
    names = ("device", "backend", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    begin = time.perf_counter()
    llm = LLM(
        job.directory,
        **{name: getattr(config, name) for name in names},
        prefix_caching=False,
        trust_engine_code=job.arms[0].name == BARE_START,
    )
    ready = time.perf_counter()
    llm.generate([{"prompt_token_ids": list(range(3, 11))}], greedy(1))
    answered = time.perf_counter()
    return {"value": ready - begin, "unit": "s", "first answer after, s": answered - ready, "imports, s": imports}


# Measuring


def _measure(job: Job, runner: Any, arm: Arm) -> Result:
    if arm.group == "mixed":
        measured = _sampled_load(job, runner, arm) if job.engine == "transformers" else _load(job, runner, arm)
    else:
        measures: dict[str, Callable[[Job, Any, Arm], Result]] = {
            "decode": _decode,
            "context": _decode,
            "prefill": _prefill,
            "ceilings": _ceilings,
            "host": _host,
            "steps": _steps_of_load,
            "profile": _profile,
        }
        measured = measures[arm.group](job, runner, arm)
    return {"unit": arm.unit, **measured}


def prompts_of(job: Job, lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(len(lengths))
    vocabulary = range(3, shape_of(job)["vocab_size"])
    return [generator.choices(vocabulary, k=length) for length in lengths]


def seconds(run: Callable[[Prompts, Sequence[int]], None], prompts: Prompts, new_tokens: Sequence[int]) -> float:
    begin = time.perf_counter()
    run(prompts, new_tokens)
    return time.perf_counter() - begin


def best(job: Job, *measures: Callable[[], float]) -> list[float]:
    """The least of each, measured in turns, as often as fits into the time that is left; once at least."""
    rounds: list[list[float]] = []
    while len(rounds) < job.repeats and (not rounds or time.time() + sum(rounds[-1]) < job.deadline):
        rounds.append([measure() for measure in measures])
    return [min(results) for results in zip(*rounds, strict=True)]


def _decode(job: Job, runner: Runner, arm: Arm) -> Result:
    prompts = prompts_of(job, [arm.length] * arm.batch)
    runner.generate(
        prompts[:1] if arm.group == "context" else prompts, [4] * (1 if arm.group == "context" else arm.batch)
    )
    # In turns: a GPU that grows warm and slow between the two would show in their difference.
    first, whole = best(
        job,
        lambda: seconds(runner.generate, prompts, [1] * arm.batch),
        lambda: seconds(runner.generate, prompts, [arm.new] * arm.batch),
    )
    return {"value": 1e3 * (whole - first) / (arm.new - 1), "time to first tokens, ms": 1e3 * first}


def _prefill(job: Job, runner: Runner, arm: Arm) -> Result:
    prompts = prompts_of(job, [arm.length] * arm.batch)
    runner.generate(prompts[:1], [1])
    (least,) = best(job, lambda: seconds(runner.generate, prompts, [1] * arm.batch))
    return {"value": 1e3 * least, "tokens/s": arm.length * arm.batch / least}


def _requests(job: Job) -> tuple[list[list[int]], list[int]]:
    """Prompts and new tokens of the mixed load."""
    requests = job.sizes.mixed()
    return prompts_of(job, [length for length, _ in requests]), [count for _, count in requests]


def _load(job: Job, runner: Any, arm: Arm) -> Result:
    prompts, counts = _requests(job)
    if arm.name == ARRIVALS:
        least = seconds(runner.serve, prompts, counts)
    else:
        runner.generate(prompts[:64], [4] * len(prompts[:64]))
        (least,) = best(job, lambda: seconds(runner.generate, prompts, counts))
    total = sum(counts) + sum(map(len, prompts))
    return {"value": sum(counts) / least, "total tokens/s": total / least, "seconds": least}


def _steps_of_load(job: Job, runner: Runner, arm: Arm) -> Result:
    prompts, counts = _requests(job)
    runner.generate(prompts, counts)  # captures what shapes it meets
    cuda = job.device == "cuda"
    with recorded(cuda) as steps:
        wall = seconds(runner.generate, prompts, counts)
    if cuda:
        torch.cuda.synchronize()
    return {"value": wall, **summary(steps, wall)}


def _sampled_load(job: Job, runner: Runner, arm: Arm) -> Result:
    """The first requests of the load in batches of 64, as they arrive, until the time for it is spent."""
    requests = job.sizes.mixed()[: job.peer_requests]
    done, size, begin = 0, 64, time.perf_counter()
    while done < len(requests) and (done == 0 or time.perf_counter() - begin < job.peer_seconds):
        batch = requests[done : done + size]
        runner.generate(prompts_of(job, [length for length, _ in batch]), [count for _, count in batch])
        done += len(batch)
    took = time.perf_counter() - begin
    return {"value": sum(count for _, count in requests[:done]) / took, "seconds": took, "requests": done}


def _ceilings(job: Job, runner: Runner, arm: Arm) -> Result:
    """bytes/s of a reduction over 2 GB; flop/s of the products of large square matrices of random numbers."""
    cuda = job.device == "cuda"
    data = torch.ones(1 << (29 if cuda else 20), device=job.device)
    read = data.nbytes / _least(data.sum, cuda)
    del data
    size = 8192 if cuda else 128
    left = torch.randn(size, size, device=job.device, dtype=torch.bfloat16)
    result = {"value": read / 1e12, "read": read, "bf16": 2 * size**3 / _least(lambda: left @ left, cuda)}
    if cuda and torch.cuda.get_device_capability() >= (8, 9):
        narrow, one = left.to(torch.float8_e4m3fn), torch.ones((), device=job.device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(narrow, narrow.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        result["fp8"] = 2 * size**3 / _least(product, cuda)
    return result


def _least(function: Callable[[], object], cuda: bool, calls: int = 10) -> float:
    """Seconds of one of `calls` calls, the least of three rounds behind a warm-up."""
    times = []
    for _ in range(4):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return min(times[1:])


@contextmanager
def _decoding(job: Job, runner: EngineRunner, arm: Arm, steps: int) -> Iterator[Callable[[], float]]:
    """A session in which all sequences of the arm decode; the function given advances it and returns seconds a step."""
    session = runner.session
    before = session.stats().num_scheduled_tokens
    new = min(steps + SPARE_STEPS, job.sizes.max_model_len - arm.length)
    ids = [session.add(prompt, greedy(new)) for prompt in prompts_of(job, [arm.length] * arm.batch)]

    def advance(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            session.step()
        return (time.perf_counter() - begin) / count

    try:
        while session.stats().num_scheduled_tokens - before < arm.batch * arm.length:
            session.step()
        advance(2)
        yield advance
        if session.stats().num_running != arm.batch:
            raise RuntimeError(f"{session.stats().num_running} of {arm.batch} sequences were decoding at the end")
    finally:
        for request_id in ids:
            session.cancel(request_id)
        while session.has_work:
            session.step()


def _steps(job: Job) -> tuple[int, int]:
    """(timed, profiled) steps in which all sequences decode."""
    return (4, 1) if job.tiny else (32, 8)


def _host(job: Job, runner: EngineRunner, arm: Arm) -> Result:
    steps, few = _steps(job)
    with _decoding(job, runner, arm, steps + few) as advance:
        before = _counters(runner)
        step = advance(steps)
        spent = {name: 1e3 * (value - before[name]) / steps for name, value in _counters(runner).items()}
        profile = profiled(lambda: advance(few), few, job.device)
    parts = {f"{name}, ms": value for name, value in spent.items()}
    host = sum(value for name, value in spent.items() if name != "engine")
    waits = 1e3 * step - profile.busy_us / 1e3
    return {"value": host, "step, ms": 1e3 * step, "device waits, ms": waits, **parts}


def _counters(runner: EngineRunner) -> dict[str, float]:
    """The session's seconds by part of the step."""
    stats = runner.session.stats()
    names = [name for name in dir(stats) if name.endswith("_seconds") and name != "host_seconds"]
    return {name.removesuffix("_seconds"): getattr(stats, name) for name in names}


def _profile(job: Job, runner: EngineRunner, arm: Arm) -> Result:
    if "prefill" in arm.name:
        prompts = prompts_of(job, [arm.length])
        runner.generate(prompts, [1])
        (step,) = best(job, lambda: seconds(runner.generate, prompts, [1]))
        profile = profiled(lambda: runner.generate(prompts, [1]), 1, job.device)
    else:
        steps, few = _steps(job)
        with _decoding(job, runner, arm, steps + few) as advance:
            step = advance(steps)
            profile = profiled(lambda: advance(few), few, job.device)
    return {"value": 1e3 * step, **profile.to_json(1e6 * step)}
