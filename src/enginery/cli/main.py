"""`enginery`: the command line. Every command is one module; torch is imported only by a command that needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import import_module

import typer

from enginery.errors import EngineryError, EngineryWarning

app = typer.Typer(
    name="enginery",
    help="Bring a network, see and rewrite its graph, build an engine, run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = ("run", "chat", "build", "inspect", "explain", "bench", "doctor")
for command in COMMANDS:
    import_module(f"enginery.cli.{command}").register(app)


def main(argv: list[str] | None = None) -> None:
    """Runs a command and exits: 0, or the exit code of the error, whose one line goes to standard error."""
    arguments = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", EngineryWarning)
    warnings.showwarning = lambda message, *place: print(f"warning: {message}", file=sys.stderr)
    try:
        code = app(arguments, standalone_mode=False) or 0
    except EngineryError as error:
        report(error, as_json="--json" in arguments)
        code = error.exit_code
    except typer.Abort:
        code = 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()} Try `enginery --help`.", file=sys.stderr)
        code = 2
    sys.exit(code)


def report(error: EngineryError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error), "code": error.exit_code}}))
    else:
        print(f"error: {error}", file=sys.stderr)
