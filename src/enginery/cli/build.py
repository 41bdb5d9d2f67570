"""`enginery build MODEL -o DIR`: an engine ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from enginery.cli.options import EngineOptions, Json, Model, takes
from enginery.cli.output import print_json
from enginery.cli.progress import Progress


@takes(EngineOptions)
def build(
    options: EngineOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the engine; an old one is replaced at the end.")
    ],
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Import a checkpoint, rewrite its network, bind the weights, compile, and write the engine."""
    from enginery.llm import build as build_engine

    arguments = options.arguments()
    with Progress(quiet=as_json) as progress:
        built = build_engine(model, output=output, progress=progress, **arguments)
    if as_json:
        print_json(built.summary())
    else:
        print(built)


def register(app: typer.Typer) -> None:
    app.command()(build)
