"""The options that commands share, declared once, and what they mean to `LLM`."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from enginery.cli.units import parse_bytes, parse_count
from enginery.cli.user_rules import load_rule
from enginery.errors import UsageError

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Checkpoint directory, hub id or engine directory; default: the bundled one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built for; `arguments()` gives the fields of a `BuildConfig`, for `LLM` too."""

    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    quantization: Annotated[str | None, typer.Option(help="fp8: linear layers in 8-bit floats.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    max_model_len: Annotated[str | None, typer.Option(help="Longest sequence, such as 4096 or 32K.")] = None
    max_num_seqs: Annotated[str, typer.Option(help="Sequences that run at once.")] = "256"
    max_num_batched_tokens: Annotated[str | None, typer.Option(help="New tokens of one step, over all sequences.")] = (
        None
    )
    kv_cache_memory: Annotated[str | None, typer.Option(help="Memory of the KV cache, such as 2GiB.")] = None
    backend: Annotated[str, typer.Option(help="compiled, or eager: instant start, slow, the reference.")] = "compiled"
    disable_rule: Annotated[list[str] | None, typer.Option(help="Switch a rewrite rule off by name (repeatable).")] = (
        None
    )
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="A rule of your own, FILE.py:ClassName, whose file is run; or one that is off by default (repeatable)."
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = asdict(self)
        values["disabled_rules"] = tuple(values.pop("disable_rule") or ())
        values["rules"] = tuple(load_rule(text) for text in values.pop("rule") or ())
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            values[name] = None if values[name] is None else parse_count(values[name], flag(name))
        if self.kv_cache_memory is not None:
            values["kv_cache_memory"] = parse_bytes(self.kv_cache_memory, flag("kv_cache_memory"))
        return values


@dataclass(frozen=True)
class RunOptions(EngineOptions):
    """As `EngineOptions`, for commands that open an engine."""

    trust_engine_code: Annotated[
        bool, typer.Option("--trust-engine-code", help="Run compiled code of an engine that this user did not build.")
    ] = False


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def takes(options_type: type) -> Callable[[Callable], Callable]:
    """Replaces the parameter `options` of a command by one command-line option for each field of `options_type`."""
    hints = get_type_hints(options_type, include_extras=True)
    extra = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(options_type)
    ]

    def decorate(command: Callable) -> Callable:
        own = get_type_hints(command, include_extras=True)
        parameters = inspect.signature(command).parameters.values()
        kept = [p.replace(annotation=own[p.name]) for p in parameters if p.name != "options"]

        @wraps(command)
        def run(*args: Any, **kwargs: Any) -> Any:
            options = options_type(**{p.name: kwargs.pop(p.name) for p in extra})
            return command(*args, options=options, **kwargs)

        run.__signature__ = inspect.Signature([*kept, *extra])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*kept, *extra]}
        return run

    return decorate


def parse_options(text: str, name: str) -> EngineOptions:
    """The options of a configuration from one string, as on a command line; `name` is the flag that it came by."""

    @takes(EngineOptions)
    def configuration(options: EngineOptions) -> EngineOptions:
        return options

    parser = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    parser.command(add_help_option=False)(configuration)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f'{name} "{text}": {error}', 'Give options, such as "--dtype float32"') from None
    return typer.main.get_command(parser).main(words, standalone_mode=False)
