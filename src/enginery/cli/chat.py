"""`enginery chat [MODEL]`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from enginery.cli.options import Model, RunOptions, takes
from enginery.cli.output import require_success
from enginery.cli.progress import Progress
from enginery.errors import RequestError, StepError, UsageError


@takes(RunOptions)
def chat(
    options: RunOptions,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of one answer.")] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
) -> None:
    """Talk to a model. `/reset` starts over, `/quit` or end of input ends; Ctrl-C stops an answer."""
    from enginery.llm import LLM
    from enginery.runtime.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with Progress() as progress:
        llm = LLM(model, progress=progress, **options.arguments())
    with llm:
        if not llm.has_chat_template:
            raise UsageError("this model has no chat template", "Use `enginery run --raw`")
        while (line := read_line()) is not None:
            if line == "/quit":
                break
            if line == "/reset":
                messages = list(opening)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    messages.append({"role": "assistant", "content": answer(llm, messages, params)})
                except (RequestError, StepError) as error:
                    print(f"error: {error} (/reset starts over)", file=sys.stderr)
                    messages.pop()


def answer(llm, messages: list[dict[str, str]], params) -> str:
    text, output = "", None
    stream = llm.stream(messages, params)
    try:
        for output in stream:
            text += output.outputs[0].text
            sys.stdout.write(output.outputs[0].text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    sys.stdout.write("\n")
    require_success(output)
    return text


def read_line() -> str | None:
    """One line of the user, without a prompt if nobody is at a terminal; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def register(app: typer.Typer) -> None:
    app.command()(chat)
