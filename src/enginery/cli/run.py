"""`enginery run [MODEL] PROMPT`: one answer, streamed."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from enginery.cli.options import Json, RunOptions, takes
from enginery.cli.output import print_json, require_success
from enginery.cli.progress import Progress
from enginery.errors import UsageError

Words = Annotated[
    list[str], typer.Argument(metavar="[MODEL] PROMPT", help="The prompt, behind a model if not the bundled one.")
]


@takes(RunOptions)
def run(
    words: Words,
    options: RunOptions,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens; default: up to the context length.")] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself; no chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, streaming. The engine is built on the first run and found in the cache after that."""
    if len(words) > 2:
        raise UsageError(f"{len(words)} arguments given", 'Quote the prompt: enginery run [MODEL] "PROMPT"')
    model, prompt = (words[0], words[1]) if len(words) == 2 else (None, words[0])

    from enginery.llm import LLM
    from enginery.runtime.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with Progress(quiet=as_json) as progress:
        llm = LLM(model, progress=progress, **options.arguments())
    with llm:
        text, output = "", None
        token_ids: list[int] = []
        for output in llm.stream(prompt if raw or not llm.has_chat_template else user_message(prompt), params):
            delta = output.outputs[0]
            text, token_ids = text + delta.text, token_ids + delta.token_ids
            if not as_json:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        if not as_json:
            sys.stdout.write("\n")
        require_success(output)
        if as_json:
            print_json(summary(text, token_ids, output))


def user_message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def summary(text: str, token_ids: list[int], last: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": len(last.prompt_token_ids), "completion_tokens": len(token_ids)}
    return {"text": text, "token_ids": token_ids, "finish_reason": last.outputs[0].finish_reason, "usage": usage}


def register(app: typer.Typer) -> None:
    app.command()(run)
