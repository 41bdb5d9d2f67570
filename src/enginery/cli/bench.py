"""`enginery bench {latency,throughput} [MODEL]`: what users compare, measured on their own machine."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.cli.options import Json, Model, RunOptions, takes
from enginery.cli.output import print_json, print_table
from enginery.cli.progress import Progress
from enginery.errors import UsageError

if TYPE_CHECKING:
    from enginery.llm import LLM
    from enginery.runtime.outputs import RequestOutput

WARM_UP = 64
"""requests that run before the measured ones, for a few tokens"""
FIRST_TOKEN_ID = 3
"""smaller ids are special tokens in most vocabularies"""

InputLen = Annotated[int, typer.Option(help="Tokens of each prompt.")]
OutputLen = Annotated[int, typer.Option(help="New tokens of each request.")]


@dataclass(frozen=True)
class Load:
    """Requests of random token ids with the lengths given; greedy, end of sequence ignored, no text."""

    input_lengths: list[int]
    output_lengths: list[int]
    seed: int = 0

    def run(self, llm: LLM) -> tuple[list[RequestOutput], float]:
        """The outputs and the seconds from the first submission to the last token."""
        from enginery.runtime.sampling_params import SamplingParams

        generator = random.Random(self.seed)
        vocabulary = llm.engine.limits.vocab_size
        prompts = [
            {"prompt_token_ids": [generator.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(length)]}
            for length in self.input_lengths
        ]
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in self.output_lengths
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        return outputs, time.perf_counter() - begin


@takes(RunOptions)
def latency(
    options: RunOptions,
    model: Model = None,
    batch_size: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    input_len: InputLen = 32,
    output_len: OutputLen = 65,
    repeats: Annotated[int, typer.Option(help="Measured runs behind one warm-up; the best is printed.")] = 2,
    as_json: Json = False,
) -> None:
    """Time to first token and milliseconds per step of one batch.

    A step's time is (time for all tokens - time for one) / (tokens - 1). Prefix cache off.
    """
    check_positive(batch_size=batch_size, input_len=input_len, output_len=output_len, repeats=repeats)
    with open_llm(model, options, as_json) as llm:

        def seconds(new: int) -> float:
            return Load([input_len] * batch_size, [new] * batch_size).run(llm)[1]

        seconds(output_len)
        first = min(seconds(1) for _ in range(repeats))
        values = {"time to first token, ms": 1e3 * first, "input tokens/s": batch_size * input_len / first}
        if output_len > 1:
            step = (min(seconds(output_len) for _ in range(repeats)) - first) / (output_len - 1)
            values |= {"per step, ms": 1e3 * step, "output tokens/s": batch_size / step if step > 0 else 0.0}
        show(values | host_times(llm), as_json)


@takes(RunOptions)
def throughput(
    options: RunOptions,
    model: Model = None,
    num_prompts: Annotated[int, typer.Option(help="Requests, all submitted at once.")] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    spread: Annotated[float, typer.Option(help="Lengths vary evenly by this part of themselves, 0 to 1.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Tokens/s under load, with KV use and the host's time per step."""
    check_positive(num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    if not 0 <= spread < 1:
        raise UsageError(f"--spread {spread} is out of range", "Give a number from 0 up to, not including, 1")
    generator = random.Random(0)

    def lengths(mean: int) -> list[int]:
        return [max(1, round(mean * generator.uniform(1 - spread, 1 + spread))) for _ in range(num_prompts)]

    load = Load(lengths(input_len), lengths(output_len))
    with open_llm(model, options, as_json) as llm:
        warm = load.input_lengths[:WARM_UP]
        Load(warm, [4] * len(warm), seed=1).run(llm)
        outputs, seconds = load.run(llm)
        totals = {
            "requests/s": num_prompts / seconds,
            "input tokens/s": sum(load.input_lengths) / seconds,
            "output tokens/s": sum(load.output_lengths) / seconds,
            "total, s": seconds,
        }
        show(totals | request_times(outputs) | host_times(llm), as_json)


def open_llm(model: str | None, options: RunOptions, quiet: bool) -> LLM:
    from enginery.llm import LLM

    with Progress(quiet=quiet) as progress:
        return LLM(model, progress=progress, prefix_caching=False, **options.arguments())


def request_times(outputs: list[RequestOutput]) -> dict[str, float]:
    """Medians over requests: time to first token from arrival, and time per token after it, in milliseconds."""
    first, each = [], []
    for output in outputs:
        times = output.metrics
        if times is None or times.first_token_time is None or times.finished_time is None:
            continue
        first.append(times.first_token_time - times.arrival_time)
        later = sum(len(completion.token_ids) for completion in output.outputs) - 1
        if later > 0:
            each.append((times.finished_time - times.first_token_time) / later)
    return {
        "time to first token, ms": 1e3 * statistics.median(first) if first else 0.0,
        "time per output token, ms": 1e3 * statistics.median(each) if each else 0.0,
    }


def host_times(llm: LLM) -> dict[str, float]:
    stats = llm.metrics()
    steps = max(stats.num_steps, 1)
    return {
        "engine per step, ms": 1e3 * stats.engine_seconds / steps,
        "host per step, ms": 1e3 * stats.host_seconds / steps,
        "steps": float(stats.num_steps),
        "preemptions": float(stats.num_preemptions),
        "KV blocks": float(stats.num_blocks),
        "KV use at the peak, %": 100 * stats.peak_used_blocks / max(stats.num_blocks, 1),
    }


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range", "Give an integer of at least 1")


def show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        print_table("", ("measured", "value"), ((name, float(value)) for name, value in values.items()))


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure this machine: latency of a batch, throughput under load.", no_args_is_help=True)
    bench.command()(latency)
    bench.command()(throughput)
    app.add_typer(bench, name="bench")
