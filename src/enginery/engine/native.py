"""From the C++ that Inductor writes for a region to a shared library, with the compiler in our hands.

Inductor compiles one region after another, with its own choice of effort. Here the compilers of all regions run side by
side; the host code of a region, which runs once a step, is compiled with little effort and its kernels with much; and a
kernel starts threads only where there is work for them (one token of decoding is a few microseconds of glue).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from enginery import env
from enginery.errors import BuildError, ResourceError

PARALLEL_ROWS = 16
"""a kernel over fewer rows than this runs on one thread"""
TIMEOUT_S = 900

_HOST_EFFORT = "-O1"
_KERNEL_EFFORT = "-O3"
_EAGER = "Use --backend eager, or name another compiler in ENGINERY_CXX"
_KERNEL_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>"
_KERNEL = re.compile(r'extern "C" +void +\w+\((?P<parameters>[^)]*)\)\s*\{')
_SIZE = re.compile(r"const int64_t (ks\d+)")
_PARALLEL = re.compile(r"(#pragma omp parallel(?: num_threads\(\d+\))?)(?=\n)")


def compiler() -> str:
    """The path of the C++ compiler. Raises ResourceError where there is none."""
    name = env.read("ENGINERY_CXX")
    path = shutil.which(name)
    if path is None:
        raise ResourceError(f"there is no C++ compiler {name!r}", "Install g++, or use --backend eager")
    return path


def build_library(sources: Sequence[Path], output: Path) -> list[Path]:
    """Compiles and links what Inductor wrote for one region. Gives the files that a package needs, the library first.

    Raises BuildError with the compiler's first complaint. Blocks; meant for a thread of its own.
    """
    wrapper = _only(sources, ".wrapper.cpp")
    compile_flags = json.loads(_only(sources, "_compile_flags.json").read_text())
    link_flags = json.loads(_only(sources, "_linker_flags.json").read_text())
    objects = [path for path in sources if path.suffix == ".o"]
    host, kernels = split_source(wrapper.read_text())
    units = [(host, _HOST_EFFORT, output.with_suffix(".host.cpp"))]
    if kernels:
        units.append((serial_when_small(kernels), _KERNEL_EFFORT, output.with_suffix(".kernels.cpp")))
    commands = []
    for text, effort, path in units:
        path.write_text(text)
        objects.append(path.with_suffix(".o"))
        commands.append([*_compile_command(compile_flags), effort, "-c", str(path), "-o", str(path.with_suffix(".o"))])
    _run(commands)
    _run([_link_command(link_flags, objects, output)])
    described = {
        ".wrapper.cpp": output.with_suffix(".cpp"),  # never compiled again: torch 2.11 finds the metadata by its name
        ".wrapper.json": output.with_suffix(".json"),  # the operators that the host code dispatches, if there are any
        ".wrapper_metadata.json": output.with_name(f"{output.stem}_metadata.json"),
    }
    found = {target: path for ending, target in described.items() for path in sources if path.name.endswith(ending)}
    for target, path in found.items():
        target.write_bytes(path.read_bytes())
    return [output, *found]


def split_source(text: str) -> tuple[str, str]:
    """Host code and kernels; the second is empty where the file is not laid out as expected, and then all is in the
    first.
    """
    place = text.find(_KERNEL_INCLUDE)
    if place < 0:
        return text, ""
    host, kernels = text[:place], text[place:]
    defined = set(re.findall(r'extern "C" +void +(\w+)\(', kernels))
    declared = set(re.findall(r'extern "C" +void +(\w+)\(', host))
    return (host, kernels) if defined <= declared else (text, "")


def serial_when_small(kernels: str) -> str:
    """Gives each kernel over one symbolic size a condition under which it starts threads."""
    parts = []
    heads = list(_KERNEL.finditer(kernels))
    ends = [head.start() for head in heads[1:]] + [len(kernels)]
    if not heads:
        return kernels
    parts.append(kernels[: heads[0].start()])
    for head, end in zip(heads, ends, strict=True):
        body = kernels[head.start() : end]
        sizes = _SIZE.findall(head["parameters"])
        if len(sizes) == 1:
            body = _PARALLEL.sub(rf"\1 if({sizes[0]} >= {PARALLEL_ROWS})", body)
        parts.append(body)
    return "".join(parts)


def _compile_command(flags: Mapping[str, Any]) -> list[str]:
    dropped = ("O0", "O1", "O2", "O3", "Os", "g", "g1", "shared", "Wall", "pedantic")
    command = [compiler(), *(f"-D{name.strip()}" for name in flags["definitions"])]
    command += [f"-{flag}" for flag in flags["cflags"] if flag not in dropped]
    command += [f"-I{path}" for path in flags["include_dirs"]]
    return command + [word for text in flags["passthrough_args"] for word in text.split()]


def _link_command(flags: Mapping[str, Any], objects: Sequence[Path], output: Path) -> list[str]:
    """Links the very OpenMP runtime that torch has loaded: a second one would bring threads that fight for the same
    cores.
    """
    libraries = Path(torch.__file__).parent / "lib"
    openmp = sorted(str(path) for path in libraries.glob("libgomp*.so*"))
    command = [compiler(), "-shared", "-fPIC", "-z", "noexecstack", *map(str, objects), "-o", str(output)]
    command += [f"-L{path}" for path in flags["libraries_dirs"]] + [f"-L{libraries}"]
    for name in flags["libraries"]:
        command.append(openmp[0] if name == "gomp" and openmp else f"-l{name}")
    return command


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Runs compilers side by side; raises BuildError for the first that fails."""
    processes = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode != 0:
                raise BuildError(f"the C++ compiler failed: {_first_error(printed)}", _EAGER)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the C++ compiler did not end within {TIMEOUT_S} s", _EAGER) from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _first_error(printed: bytes) -> str:
    lines = printed.decode(errors="replace").splitlines() or ["it printed nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()[:300]


def _only(paths: Sequence[Path], ending: str) -> Path:
    found = [path for path in paths if path.name.endswith(ending)]
    if len(found) != 1:
        raise BuildError(
            f"torch {torch.__version__} gave {len(found)} files {ending} for a region", "Use --backend eager"
        )
    return found[0]


__all__ = ["build_library", "compiler", "serial_when_small", "split_source"]
