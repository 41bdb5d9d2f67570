"""From the C++ that Inductor writes for a region to a shared library, with the compiler in our hands.

Inductor compiles one region after another, with its own choice of effort. Here the compilers of all regions run side by
side; the host code of a region, which runs once a step, is compiled with little effort and its kernels with much; the
interface by which torch runs a region, the same in front of every one and most of its host code, is compiled once; and
a kernel starts threads only where there is work for them (one token of decoding is a few microseconds of glue).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from enginery import env
from enginery.engine.digest import text_digest
from enginery.errors import BuildError, ResourceError

PARALLEL_ROWS = 16
"""a kernel over fewer rows than this runs on one thread"""
TIMEOUT_S = 900

_HOST_EFFORT = "-O1"
_KERNEL_EFFORT = "-O3"
_EAGER = "Use --backend eager, or name another compiler in ENGINERY_CXX"
_INTERFACE = "_inductor/codegen/aoti_runtime/interface.cpp"
_MODEL = "template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;\n"
"""Half of the interface: what torch's headers define for every model."""
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


@dataclass(frozen=True)
class Unit:
    """What the compiler makes one object file of."""

    name: str
    text: str
    command: tuple[str, ...]
    """without the names of its files"""

    @property
    def digest(self) -> str:
        """Equal where the object files are. The compiler is known by its file."""
        binary = Path(self.command[0]).resolve().stat()
        compiler = (binary.st_size, binary.st_mtime_ns)
        return text_digest({"text": self.text, "command": self.command, "compiler": compiler})

    def compile_in(self, directory: Path) -> tuple[Path, Sequence[str]]:
        """The object file and the command that makes it there."""
        source, target = directory / f"{self.name}.cpp", directory / f"{self.name}.o"
        source.write_text(self.text)
        return target, [*self.command, "-c", str(source), "-o", str(target)]


class RegionSources:
    """What Inductor wrote for one region.

    Attributes:
        interface: the unit that other regions have as well; None where torch lays its files out in another way.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises BuildError where files are missing."""
        self._files = files
        wrapper = _only(files, ".wrapper.cpp")
        command = _compile_command(json.loads(_only(files, "_compile_flags.json").read_text()))
        parts = split_source(wrapper.read_text())
        host, kernel = (*command, _HOST_EFFORT), (*command, _KERNEL_EFFORT)
        self.interface = Unit("interface", parts.interface, host) if parts.interface else None
        self._units = [Unit("host", parts.host, host)]
        if parts.kernels:
            self._units.append(Unit("kernels", serial_when_small(parts.kernels), kernel))

    def compile(self, directory: Path) -> list[Path]:
        """The object files of what is this region's own. Blocks; meant for a thread of its own.

        Raises BuildError with the compiler's first complaint.
        """
        return [path for path in self._files if path.suffix == ".o"] + compile_units(self._units, directory)

    def link(self, objects: Sequence[Path], output: Path) -> list[Path]:
        """Gives the files that a package needs, the library first."""
        link_flags = json.loads(_only(self._files, "_linker_flags.json").read_text())
        _run([_link_command(link_flags, objects, output)])
        described = {
            ".wrapper.cpp": output.with_suffix(".cpp"),  # never compiled again: torch 2.11 finds metadata by its name
            ".wrapper.json": output.with_suffix(".json"),  # the operators that the host code dispatches, if any
            ".wrapper_metadata.json": output.with_name(f"{output.stem}_metadata.json"),
        }
        found = {
            target: path for ending, target in described.items() for path in self._files if path.name.endswith(ending)
        }
        for target, path in found.items():
            target.write_bytes(path.read_bytes())
        return [output, *found]


def compile_units(units: Sequence[Unit], directory: Path) -> list[Path]:
    """Their object files, made side by side. Raises BuildError for the first that fails."""
    started = [unit.compile_in(directory) for unit in units]
    _run([command for _, command in started])
    return [target for target, _ in started]


class Parts(NamedTuple):
    """Of the one file that Inductor writes for a region."""

    interface: str
    host: str
    kernels: str


def split_source(text: str) -> Parts:
    """Whatever is not laid out as expected stays with the host code, which is then complete without the others."""
    host, kernels = _split_kernels(text)
    head, interface, rest = host.partition(_interface()) if _interface() else (host, "", "")
    if not interface:
        return Parts("", host, kernels)
    includes = "".join(f"{line}\n" for line in interface.splitlines() if line.startswith("#include"))
    return Parts(f"{head}{interface}\n{_MODEL}", f"{head}{includes}extern {_MODEL}{rest}", kernels)


def _split_kernels(text: str) -> tuple[str, str]:
    place = text.find(_KERNEL_INCLUDE)
    if place < 0:
        return text, ""
    host, kernels = text[:place], text[place:]
    defined = set(re.findall(r'extern "C" +void +(\w+)\(', kernels))
    declared = set(re.findall(r'extern "C" +void +(\w+)\(', host))
    return (host, kernels) if defined <= declared else (text, "")


@cache
def _interface() -> str:
    """What Inductor puts in front of every region: C functions over torch's classes of models."""
    path = Path(torch.__file__).parent / _INTERFACE
    return path.read_text().strip() if path.is_file() else ""


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


def _compile_command(flags: Mapping[str, Any]) -> tuple[str, ...]:
    dropped = ("O0", "O1", "O2", "O3", "Os", "g", "g1", "shared", "Wall", "pedantic")
    command = [compiler(), *(f"-D{name.strip()}" for name in flags["definitions"])]
    command += [f"-{flag}" for flag in flags["cflags"] if flag not in dropped]
    command += [f"-I{path}" for path in flags["include_dirs"]]
    return (*command, *(word for text in flags["passthrough_args"] for word in text.split()))


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


__all__ = ["RegionSources", "Unit", "compile_units", "compiler", "serial_when_small", "split_source"]
