"""The C++ kernels, compiled on first use for this CPU and this torch, and kept in the user's cache.

A library lies in `CACHE/kernels/FINGERPRINT/`, a directory that only its owner may enter, and is moved there whole: a
process sees a complete library or none, and of two processes that compile at once the first one's result stands. Since
loading it runs it, a library is taken from the cache only if this user owns it and nobody else may write it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from enginery import env
from enginery.errors import BuildError
from enginery.kernels.cpu_features import cpu_flags
from enginery.private_files import PrivateFiles

SOURCES = Path(__file__).parent / "cpp"
LIBRARY = "kernels.so"
NATIVE = ("-march=native",)
BINDING = "bind.cpp"
"""The one unit that sees torch's headers."""

_OPTIONS = ("-O3", "-fPIC", "-fopenmp", "-Wno-maybe-uninitialized", "-Wno-psabi")
_TIMEOUT_S = 600
_PRIVATE = PrivateFiles(foreign=BuildError, unusable=BuildError)

Report = Callable[[str], None]


def library(target: tuple[str, ...] = NATIVE, report: Report | None = None) -> Path:
    """The compiled kernels for `target` (the compiler's -m flags), from the cache or compiled now.

    `report` receives one line before a compilation starts. Raises BuildError: no compiler, a compilation that failed,
    or a cache that others may write.
    """
    compiler = _compiler()
    root = _PRIVATE.directory(env.cache_dir() / "kernels")
    final = root / _fingerprint(compiler, target)
    if not final.exists():
        if report is not None:
            report(f"compiling the CPU kernels with {compiler.name} (once, about ten seconds)")
        _install(compiler, target, root, final)
    _PRIVATE.require(final)
    _PRIVATE.require(final / LIBRARY)
    return final / LIBRARY


def missing_compiler() -> str:
    """Why nothing can be compiled here, or nothing."""
    try:
        _compiler()
    except BuildError as error:
        return str(error)
    return ""


def _compiler() -> Path:
    name = env.read("ENGINERY_CXX")
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"there is no C++ compiler {name!r}", "Install g++ or name a compiler in ENGINERY_CXX")
    return Path(path)


def _fingerprint(compiler: Path, target: tuple[str, ...]) -> str:
    """Everything that the compiled code depends on. The compiler is known by its file: cheaper than asking it."""
    binary = compiler.resolve()
    status = binary.stat()
    facts = [torch.__version__, platform.machine(), str(binary), str(status.st_size), str(status.st_mtime_ns)]
    facts += [*_OPTIONS, *target, *sorted(cpu_flags())]
    digest = hashlib.sha256("\n".join(facts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


def _install(compiler: Path, target: tuple[str, ...], root: Path, final: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root, ignore_cleanup_errors=True) as scratch:
            finished = Path(scratch) / "finished"
            finished.mkdir(mode=0o700)
            _compile(compiler, target, Path(scratch), finished / LIBRARY)
            _publish(finished, final)
    except OSError as error:
        raise BuildError(
            f"cannot write the compiled kernels to {root}: {error.strerror}", "Free space or set ENGINERY_CACHE"
        ) from None


def _publish(finished: Path, final: Path) -> None:
    try:
        finished.rename(final)
    except OSError:
        # Another process was faster and its library is the same; any other failure is real.
        if not final.exists():
            raise


def _compile(compiler: Path, target: tuple[str, ...], scratch: Path, output: Path) -> None:
    units = sorted(SOURCES.glob("*.cpp"), key=lambda unit: -unit.stat().st_size)
    objects = [scratch / f"{unit.stem}.o" for unit in units]
    commands = [_unit_command(compiler, target, unit, to) for unit, to in zip(units, objects, strict=True)]
    _run_all(commands, scratch, at_once=os.cpu_count() or 1)
    _run_all([[str(compiler), "-shared", *map(str, objects), *_link_options(), "-o", str(output)]], scratch, at_once=1)
    output.chmod(0o700)


def _unit_command(compiler: Path, target: tuple[str, ...], unit: Path, output: Path) -> list[str]:
    if unit.name != BINDING:
        return [str(compiler), "-std=c++17", *_OPTIONS, *target, "-c", str(unit), "-o", str(output)]
    include = Path(torch.__file__).parent / "include"
    headers = [f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]
    return [str(compiler), "-std=c++20", "-O1", "-fPIC", *target, *headers, "-c", str(unit), "-o", str(output)]


def _link_options() -> list[str]:
    """Links the very OpenMP runtime that torch has loaded, under whatever name its wheel gave it.

    With a second runtime there would be two pools of threads that fight for the same cores. The dynamic linker finds
    both libraries by the names of those already loaded, so no run path is needed.
    """
    libraries = Path(torch.__file__).parent / "lib"
    openmp = sorted(libraries.glob("libgomp*.so*"))
    return [str(openmp[0]) if openmp else "-fopenmp", f"-L{libraries}", "-ltorch_cpu"]


def _run_all(commands: list[list[str]], directory: Path, at_once: int) -> None:
    """Runs compilers side by side; the first that fails ends all."""
    waiting = list(reversed(commands))
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                log = directory / f"log-{len(waiting)}"
                running.append((_start(waiting.pop(), log), log))
            process, log = running[0]
            if process.wait(timeout=_TIMEOUT_S) != 0:
                raise BuildError(
                    f"the C++ compiler failed: {_first_error(log)}", "Name another compiler in ENGINERY_CXX"
                )
            running.pop(0)
    except subprocess.TimeoutExpired:
        raise BuildError("the C++ compiler did not end", "Name another compiler in ENGINERY_CXX") from None
    finally:
        for process, _ in running:
            process.kill()
            process.wait()


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)


def _first_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() or ["it printed nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()[:300]
