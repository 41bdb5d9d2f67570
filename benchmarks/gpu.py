"""A decoder of Llama-3.1-8B's shape with random weights on one GPU, beside vLLM's figures and the device's limits.

    python benchmarks/gpu.py --write                               # everything, bfloat16 and float8
    python benchmarks/gpu.py --only decode,mixed --dtype bf16      # some groups; see decoder/protocol.py
    python benchmarks/gpu.py --profile                             # by kernels, gaps and kinds of steps, too
    python benchmarks/gpu.py --markdown docs/performance.md        # puts the tables of the record into the document
    python benchmarks/gpu.py --device cpu --tiny                   # does it run at all? Seconds, no meaning

Each engine runs in a process of its own that measures arm after arm; a process that dies costs one arm. One JSON line
is printed per arm as it ends, then the table. `--budget` ends the run in time and keeps what there is. `--write` puts
the arms into benchmarks/results/gpu.json, beside those that were measured before on the same GPU, driver and torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from decoder.job import OPEN, Job
from decoder.protocol import BARE_START, DTYPES, GROUPS, MEASURED_BY_WORKER, SLOW_GROUPS
from decoder.shapes import shape_name
from decoder.tables import put_into, show, tables
from enginery import env
from record import RESULTS, entry_of, write_entry

NAME = "gpu"
GRACE_S = 8.0
"""what a worker has to end by itself before it is ended"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    path = options.record or RESULTS / f"{NAME}.json"
    if options.worker is not None:
        return work(options.worker)
    if options.markdown is not None:
        text = tables(json.loads(path.read_text()))
        print(text) if options.markdown == "-" else put_into(Path(options.markdown), text)
        return 0
    record = entry_of(NAME, {}, ["vllm"]) | {"shape": shape_name(options.tiny, options.layers)}
    record["results"] = former(path, record) if options.write else {}
    for key, line in measure(options):
        keep(record["results"], key, line)
        print(json.dumps({"arm": key, **short(line)}), flush=True)
        if options.write:
            write_entry(record, path)
    print(show(record))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        default="",
        help=f"groups, comma-separated: {','.join(GROUPS)}; default: all but steps, profile and bare",
    )
    parser.add_argument("--profile", action="store_true", help="the groups steps and profile, too")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, tiny sizes and the eager backend")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--backend", choices=["compiled", "eager"])
    parser.add_argument("--step-tokens", type=int, help="max_num_batched_tokens; default: that of the engine")
    parser.add_argument("--repeats", type=int, default=2, help="measured runs of an arm; the best counts")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which the run has ended")
    parser.add_argument("--peer-requests", type=int, default=64, help="of the mixed load, for transformers")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="no further batch of them after that")
    parser.add_argument("--engines", type=Path, help="where the built engines are kept; default: in the cache")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    parser.add_argument("--record", type=Path, help="another file for --write and --markdown")
    parser.add_argument(
        "--markdown", nargs="?", const="-", metavar="FILE", help="print the record's tables, or fill FILE"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(filter(None, options.only.split(","))) - set(GROUPS)
    if unknown:
        parser.error(f"--only {min(unknown)} is no group; they are {', '.join(GROUPS)}")
    return options


def work(job: str) -> int:
    begin = time.perf_counter()
    from decoder.worker import main as measure_all

    return measure_all(Job.from_json(job), time.perf_counter() - begin)


# Collecting


def measure(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(engine dtype arm, its result) as each arm ends."""
    deadline = time.time() + options.budget
    for job in jobs(options, deadline):
        pending = list(job.names)
        while pending:
            ended = []
            for message in run_worker(dataclasses.replace(job, names=tuple(pending))):
                ended.append(message["arm"])
                if not message.pop("internal", False):
                    yield key_of(job, message.pop("arm")), message | {"when": now()}
            left = [name for name in pending if name not in ended]
            if time.time() > job.deadline:
                yield from ((key_of(job, name), {"skipped": "the budget is spent", "when": now()}) for name in left)
                break
            if len(left) == len(pending):  # the engine did not open, and would not at the next try
                break
            pending = left


def key_of(job: Job, arm: str) -> str:
    return f"{job.engine} {job.dtype} {arm}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def jobs(options: argparse.Namespace, deadline: float) -> Iterator[Job]:
    """One for all groups that share a process, in the order in which they are run."""
    wanted = set(filter(None, options.only.split(","))) or set(GROUPS) - SLOW_GROUPS
    wanted |= {"steps", "profile"} if options.profile else set()
    for dtype in DTYPES if options.dtype == "both" else (options.dtype,):
        plans = [
            ("enginery", [group for group in MEASURED_BY_WORKER if group in wanted]),
            ("enginery", [group for group in ("start", "bare") if group in wanted]),
            ("transformers", ["transformers"] if "transformers" in wanted and dtype == "bf16" else []),
            ("vllm", ["vllm"] if "vllm" in wanted else []),
        ]
        for engine, groups in plans:
            if groups:
                yield job_of(options, engine, dtype, groups, deadline)


def job_of(options: argparse.Namespace, engine: str, dtype: str, groups: list[str], deadline: float) -> Job:
    shape = f"{'tiny' if options.tiny else 'llama-8b'}-{options.layers or 'all'}-{dtype}-{options.device}"
    engines = options.engines or env.cache_dir() / "benchmarks" / "engines"
    job = Job(
        engine=engine,
        dtype=dtype,
        groups=tuple(groups),
        names=(),
        deadline=deadline - min(GRACE_S, options.budget / 10),
        pipe=-1,
        device=options.device,
        directory=str(engines / shape),
        tiny=options.tiny,
        layers=options.layers,
        backend=options.backend or ("eager" if options.tiny else "compiled"),
        step_tokens=options.step_tokens,
        repeats=options.repeats,
        peer_requests=options.peer_requests,
        peer_seconds=options.peer_seconds,
    )
    return dataclasses.replace(job, names=tuple(arm.name for group in groups for arm in job.sizes.arms(group)))


def run_worker(job: Job) -> Iterator[dict[str, Any]]:
    """The results of one process; if it dies, that is the result of the arm that it was at."""
    ours, theirs = os.pipe()
    command = [sys.executable, __file__, "--worker", dataclasses.replace(job, pipe=theirs).to_json()]
    with tempfile.TemporaryDirectory() as empty:
        bare = {"ENGINERY_CACHE": empty, "TRITON_CACHE_DIR": empty} if job.names[0] == BARE_START else {}
        process = subprocess.Popen(
            command, pass_fds=[theirs], env=os.environ | bare, stdout=sys.stderr, start_new_session=True
        )
        os.close(theirs)
        killer = threading.Timer(max(1.0, job.deadline + GRACE_S * 0.75 - time.time()), end, [process])
        killer.start()
        running = OPEN
        try:
            with os.fdopen(ours) as messages:
                for line in messages:
                    message = json.loads(line)
                    running = message.get("begin", "")
                    if "end" in message:
                        break
                    if not running:
                        yield message
        finally:
            if not running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            killer.cancel()
            end(process)
    if running:
        yield {"arm": running, "failed": f"the process ended with {death(process.returncode)}"}


def end(process: subprocess.Popen[bytes]) -> None:
    """The worker and the compilers that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# Keeping


def former(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier record of this very machine, torch and shape; without one, nothing."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(earlier.get(name) == record[name] for name in ("hardware", "versions", "shape"))
    return earlier["results"] if same else {}


def keep(results: dict[str, Any], key: str, line: dict[str, Any]) -> None:
    """A result takes the place of the failure to open its engine."""
    results[key] = line
    opening = f"{' '.join(key.split(' ')[:2])} {OPEN}"
    if "value" in line and "value" not in results.get(opening, line):
        del results[opening]


def short(value: Any) -> Any:
    """Without the kernels and gaps of a profile, and with four digits."""
    if isinstance(value, dict):
        return {name: short(each) for name, each in value.items() if name not in ("kernels", "idle", "when")}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
