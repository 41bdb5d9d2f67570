"""`enginery inspect [MODEL]`: what would happen, before anything is loaded; with `--profile`, what a step costs."""

from __future__ import annotations

import typer

from enginery.cli.options import Json, Model, takes
from enginery.cli.output import print_json, print_table
from enginery.cli.profile import InspectOptions, profile_model, show
from enginery.cli.units import format_bytes


@takes(InspectOptions)
def inspect(options: InspectOptions, model: Model = None, as_json: Json = False) -> None:
    """Format, support, memory plan and regions of a checkpoint or an engine. No weight is read.

    With --profile: FLOPs, bytes and roofline time of a step, layer by layer; with --measure also what its regions take.
    """
    if options.profile or options.measure:
        profiled = profile_model(model, options)
        if as_json:
            print_json(profiled.to_json())
        else:
            show(profiled)
        return
    from enginery.llm import inspect_model

    found = inspect_model(model, **options.arguments())
    if as_json:
        print_json(found.summary())
        return
    facts, plan = found.facts, found.plan
    print_table(
        "",
        ("", ""),
        (
            ("format", found.format),
            (
                "architecture",
                f"{facts.architecture}, {facts.num_layers} × {facts.hidden_size}, vocabulary {facts.vocab_size}",
            ),
            ("precision", facts.dtype),
            ("context", f"{plan.limits.max_model_len} tokens of {facts.max_position_embeddings}"),
            ("weights", format_bytes(plan.weights)),
            (
                "KV cache",
                f"{format_bytes(plan.kv_cache)}: {plan.limits.num_blocks} blocks of {plan.limits.block_size} tokens",
            ),
            ("activations", f"{format_bytes(plan.activations)} for {plan.limits.max_num_tokens} tokens a step"),
            ("memory", f"{format_bytes(plan.total)} of {format_bytes(plan.available)} available on {plan.device}"),
            ("regions", ", ".join(f"{name} ({layers} layers)" for name, layers in found.regions.items())),
            ("next", found.advice),
        ),
    )


def register(app: typer.Typer) -> None:
    app.command()(inspect)
