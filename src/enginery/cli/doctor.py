"""`enginery doctor`: what this machine offers, what is missing, and what would be used."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata

import typer

from enginery import env
from enginery.cli.options import Json
from enginery.cli.output import print_json, print_table
from enginery.cli.units import format_bytes

PACKAGES = ("enginery", "torch", "transformers", "tokenizers", "safetensors", "triton")


def doctor(as_json: Json = False) -> None:
    """Check compiler, processor, memory, kernels, GPU and cache."""
    facts = machine() | versions() | compiler() | cache() | gpu()
    kernels = kernel_rows()
    if as_json:
        print_json(
            {"facts": facts, "kernels": [dict(zip(("op", "kernel", "reason"), row, strict=True)) for row in kernels]}
        )
        return
    print_table("", ("what", "found"), facts.items())
    print()
    print_table("", ("op", "kernel", "why"), kernels)


def machine() -> dict[str, str]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    return {
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "memory": f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def compiler() -> dict[str, str]:
    name = env.read("ENGINERY_CXX")
    path = shutil.which(name)
    return {
        "C++ compiler": path
        or f"{name} not found: kernels and regions fall back to references (install it, or --backend eager)"
    }


def cache() -> dict[str, str]:
    directory = env.cache_dir()
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0
    return {"cache": f"{directory}, {format_bytes(size)} used, {format_bytes(free_disk(directory))} free"}


def free_disk(directory) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"GPU": "none that torch can use"}
    properties = torch.cuda.get_device_properties(0)
    capability = f"compute {properties.major}.{properties.minor}"
    return {"GPU": f"{properties.name}, {format_bytes(properties.total_memory)}, {capability}"}


def kernel_rows() -> list[tuple[str, str, str]]:
    """Each op with the kernel that would run it, after loading (and on the first use compiling) what there is."""
    import torch

    from enginery.kernels.table import TABLE

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(row.op, row.kernel, row.reason) for row in TABLE.load(device)]


def register(app: typer.Typer) -> None:
    app.command()(doctor)
