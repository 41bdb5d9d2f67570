"""What `enginery doctor` looks at: each check says what it found and, where something is missing, what to do."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from enginery import env
from enginery.cli.units import format_bytes
from enginery.engine import gpu

PACKAGES = ("enginery", "torch", "transformers", "tokenizers", "safetensors", "triton")
MIN_DISK = 20 << 30
"""an engine of an 8B model takes 16 GB"""
MIN_MEMORY = 2 << 30
MIN_FILES = 4096
"""a server holds one descriptor per connection"""
COMPILE_TIMEOUT_S = 120

_PROBE = """
#include <regex>
extern "C" int probe(const char* text) { return std::regex_search(text, std::regex("^cuda:[0-9]+$")) ? 0 : 1; }
"""
"""Compiled regions use std::regex: the code of a compiler whose C++ library is not that of torch crashes there."""
_RUN_PROBE = "import ctypes, sys, torch; sys.exit(ctypes.CDLL(sys.argv[1]).probe(b'cuda:0'))"


@dataclass(frozen=True)
class Check:
    """`fix` is empty where nothing is missing."""

    name: str
    found: str
    fix: str = ""


def run_checks() -> Iterator[Check]:
    yield from _machine()
    yield from _packages()
    yield _compiler()
    yield _cache()
    yield from _gpu()


def _machine() -> Iterator[Check]:
    yield Check("processor", f"{platform.machine()}, {torch.get_num_threads()} threads")
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"
    yield Check("memory", found, "" if memory.available >= MIN_MEMORY else "Close other programs")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Check("file descriptors", f"{soft}", "" if soft >= MIN_FILES else f"ulimit -n {min(hard, MIN_FILES)}")


def _packages() -> Iterator[Check]:
    yield Check("python", platform.python_version())
    for package in PACKAGES:
        try:
            yield Check(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, "not installed", "" if package == "triton" else f"pip install {package}")


def _compiler() -> Check:
    """Found, and its code runs beside torch's."""
    name = env.read("ENGINERY_CXX")
    path = shutil.which(name)
    if path is None:
        fix = "Install g++ or name a compiler in ENGINERY_CXX; until then, --backend eager"
        return Check("C++ compiler", f"{name} not found: kernels and regions fall back to references", fix)
    problem = _probe_compiler(path)
    other = os.environ.get("CXX")
    note = f" (CXX={other} is not used)" if other and shutil.which(other) != path else ""
    fix = "Name another compiler in ENGINERY_CXX, such as g++" if problem else ""
    return Check("C++ compiler", (f"{path}: {problem}" if problem else path) + note, fix)


def _probe_compiler(path: str) -> str:
    """What is wrong with a compiler, or nothing."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "probe.cpp", Path(directory) / "probe.so"
        source.write_text(_PROBE)
        try:
            compiled = subprocess.run(
                [path, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)],
                capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S,
            )  # fmt: skip
            if compiled.returncode != 0:
                return f"does not compile: {gpu.first_line(compiled.stderr) or 'it printed nothing'}"
            ran = subprocess.run(
                [sys.executable, "-c", _RUN_PROBE, str(library)], capture_output=True, timeout=COMPILE_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"does not run: {gpu.first_line(str(error))}"
    return "" if ran.returncode == 0 else "its code crashes beside torch's C++ library"


def _cache() -> Check:
    directory = env.cache_dir()
    used = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{directory}, {format_bytes(used)} used, {format_bytes(free)} free"
    if not os.access(existing, os.W_OK):
        return Check("cache", f"{directory}: {existing} is not writable", "Name another directory in ENGINERY_CACHE")
    return Check("cache", found, "" if free >= MIN_DISK else "Free space, or name a larger disk in ENGINERY_CACHE")


# GPU


def _gpu() -> Iterator[Check]:
    missing = gpu.obstacle("compiled")
    if not torch.cuda.is_available():
        yield Check("GPU", missing.cause if missing else "none", missing.fix if missing else "")
        return
    for index in range(torch.cuda.device_count()):
        yield _device(index)
    yield Check("CUDA", f"driver {gpu.driver_version() or 'unknown'}, torch built for {torch.version.cuda}")
    if missing:
        yield Check("GPU engine", missing.cause, missing.fix)
    yield _triton()
    yield _headers()
    yield Check("nvcc", f"{shutil.which('nvcc') or 'not installed'}; not needed, Triton brings its assembler")
    frontend = find_spec("cudnn") is not None
    yield Check("nvidia-cudnn-frontend", "installed" if frontend else "not installed; optional")


def _device(index: int) -> Check:
    name = "GPU" if torch.cuda.device_count() == 1 else f"GPU {index}"
    properties = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Check(name, f"{properties.name}: {gpu.first_line(str(error))}", "Look at `nvidia-smi`")
    memory = f"{format_bytes(free)} free of {format_bytes(total)}"
    found = f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}"
    return Check(name, found, "" if free > total / 2 else "Other programs use it: `nvidia-smi` names them")


def _triton() -> Check:
    """Installed is not yet importable: its version must be the one that torch was built for."""
    if find_spec("triton") is None:
        return Check("Triton", "not installed", "Install the triton that this torch names in its requirements")
    try:
        import triton
    except Exception as error:  # whatever a package of another version raises
        return Check("Triton", f"does not import: {gpu.first_line(str(error))}", "Install the triton of this torch")
    return Check("Triton", triton.__version__)


def _headers() -> Check:
    """The code of a compiled region includes cuda.h."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None and (Path(CUDA_HOME) / "include" / "cuda.h").is_file():
        return Check("CUDA headers", f"{CUDA_HOME}/include")
    return Check(
        "CUDA headers",
        f"no cuda.h in {CUDA_HOME}/include" if CUDA_HOME else "not found",
        "Install the CUDA toolkit's headers and set CUDA_HOME; regions cannot be compiled without them",
    )


__all__ = ["Check", "run_checks"]
