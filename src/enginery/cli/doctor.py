"""`enginery doctor`: what this machine offers, what is missing, and what would be used."""

from __future__ import annotations

import dataclasses

import typer

from enginery.cli.options import Json
from enginery.cli.output import print_json, print_table


def doctor(as_json: Json = False) -> None:
    """Check compiler, processor, memory, kernels, GPU and cache, and say how to mend what is missing."""
    from enginery.cli.checks import run_checks

    checks = list(run_checks())
    kernels = kernel_rows()
    problems = [check for check in checks if check.fix]
    if as_json:
        print_json(
            {
                "facts": {check.name: check.found for check in checks},
                "problems": [dataclasses.asdict(check) for check in problems],
                "kernels": [dict(zip(("op", "kernel", "reason"), row, strict=True)) for row in kernels],
            }
        )
        return
    print_table("", ("what", "found"), ((check.name, check.found) for check in checks))
    print()
    print_table("", ("op", "kernel", "why"), kernels)
    for problem in problems:
        print(f"\n{problem.name}: {problem.found}\n  fix: {problem.fix}")


def kernel_rows() -> list[tuple[str, str, str]]:
    """Each op with the kernel that would run it, after loading (and on the first use compiling) what there is."""
    import torch

    from enginery.kernels.table import TABLE

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(row.op, row.kernel, row.reason) for row in TABLE.load(device)]


def register(app: typer.Typer) -> None:
    app.command()(doctor)
