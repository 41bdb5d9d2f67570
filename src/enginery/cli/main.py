"""`enginery`: the command line. Every command is one module; torch is imported only by a command that needs it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
from importlib import import_module

import typer

from enginery.errors import EngineryError, EngineryWarning, ResourceError

TERMINATED = 128 + signal.SIGTERM

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
    settle_streams()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))  # what is half written is removed
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", EngineryWarning)
    warnings.showwarning = lambda message, *place: print(f"warning: {message}", file=sys.stderr)
    try:
        invoke(arguments)
        sys.stdout.flush()
        code = 0
    except EngineryError as error:
        report(error, as_json="--json" in arguments)
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        drop_output()
        code = 0
    except OSError as error:
        drop_output()
        print(f"error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        code = ResourceError.exit_code
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()} Try `enginery --help`.", file=sys.stderr)
        code = 2
    sys.exit(code)


def invoke(arguments: list[str]) -> None:
    """As `app` would, which makes exits of interrupts and of broken pipes."""
    command = typer.main.get_command(app)
    with command.make_context("enginery", list(arguments)) as context:
        command.invoke(context)


def settle_streams() -> None:
    """There is somewhere to read from and write to, and what an encoding lacks is replaced."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Nobody reads it: what is left goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: EngineryError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error), "code": error.exit_code}}))
    else:
        print(f"error: {error}", file=sys.stderr)
