"""Compiling regions ahead of time: a region's network -> torch.export -> AOTInductor -> one package that can be loaded
and run.

Weights, KV pools and the batch's tables are inputs of the compiled code; it holds no data. Operators of ours stay
calls; everything between them is fused by Inductor. All sizes that depend on the batch are symbolic, so one compilation
serves every batch: on a CPU a decode profile of its own would change nothing but the number of threads of the glue,
which the compiled code decides by the number of rows (`native.serial_when_small`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from enginery.engine.code_cache import CodeCache
from enginery.engine.native import RegionSources, Unit, compile_units, compiler
from enginery.engine.protocol import Progress
from enginery.engine.regions import Region
from enginery.errors import BuildError
from enginery.kernels.table import TABLE
from enginery.network import Dim, Network

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]

EXAMPLE_SIZES = {"cpu": (7, 3, 5, 11, 13, 17, 19, 23), "cuda": (251, 67, 71, 73, 79, 83, 89, 97)}
"""Sizes that stand for symbols while a region is traced: no two equal, none special. On a GPU Inductor cuts the work of
its kernels by them, and a batch that is worth a thought has hundreds of tokens."""
HOST_EFFORT = {"AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0"}
"""For torch: the host code of a region for a GPU is hardly optimised, for it runs while a step is captured and beside
the kernels of steps that are too large for that."""
MODEL = "model"


class Compilation:
    """Compiles distinct regions side by side: for a CPU the Python part now and the C++ compilers in the background,
    for a GPU all of it there. `wait` gives the packages.
    """

    def __init__(self, cache: CodeCache, device: str, report: Progress | None = None) -> None:
        self._cache = cache
        self._device = torch.device(device)
        self._report = report or (lambda stage, done, total: None)
        self._done: dict[str, Path] = {}
        self._running: dict[str, Future[Path]] = {}
        self._shared: dict[str, Future[Path]] = {}
        self._beside: Future[None] | None = None
        self._pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))))
        self._total = 0

    def start(self, regions: Mapping[str, Region], meanwhile: Callable[[], None] | None = None) -> None:
        """Takes from the cache what is there and begins to compile the rest. For a GPU, this process would idle until
        then: `meanwhile` runs in a thread of it. Raises ResourceError without a compiler.
        """
        self._done = {key: path for key in regions if (path := self._cache.find(key)) is not None}
        missing = {key: region for key, region in regions.items() if key not in self._done}
        self._total = len(missing)
        if missing:
            compiler()
            self._report("compile", 0, self._total)
            if meanwhile is not None and self._device.type == "cuda":
                self._beside = self._pool.submit(meanwhile)
        for key, region in missing.items():
            self._running[key] = self._start(key, region)

    def wait(self) -> dict[str, Path]:
        """The packages by key. Raises BuildError if a compiler failed."""
        try:
            for number, (key, future) in enumerate(self._running.items(), 1):
                self._done[key] = future.result()
                self._report("compile", number, self._total)
            if self._beside is not None:
                self._beside.result()
            return self._done
        finally:
            self.close()

    def close(self) -> None:
        """Ends what has not begun; waits for the compilers that run."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: str, region: Region) -> Future[Path]:
        if self._device.type == "cuda":
            return self._pool.submit(self._in_process, key, region)
        scratch = self._cache.scratch()
        try:
            sources = RegionSources(lower(region.network, self._device, Path(scratch.name)))
        except BaseException:
            scratch.cleanup()
            raise
        shared = [] if sources.interface is None else [self._share(sources.interface)]

        def finish() -> Path:
            with scratch as name:
                directory = Path(name)
                objects = sources.compile(directory)
                objects += [future.result() for future in shared]
                files = sources.link(objects, directory / "region.so")
                return self._cache.publish(key, package(files, directory / f"{key}.pt2"))

        return self._pool.submit(finish)

    def _share(self, unit: Unit) -> Future[Path]:
        """Its object file, compiled once for all regions, and begun before those that wait for it."""

        def compiled() -> Path:
            found = self._cache.find_object(unit.digest)
            if found is not None:
                return found
            with self._cache.scratch() as directory:
                (finished,) = compile_units([unit], Path(directory))
                return self._cache.publish_object(unit.digest, finished)

        if unit.digest not in self._shared:
            self._shared[unit.digest] = self._pool.submit(compiled)
        return self._shared[unit.digest]

    def _in_process(self, key: str, region: Region) -> Path:
        """For a GPU, Inductor runs the compilers itself, one region after another: each gets a process of its own."""
        with self._cache.scratch() as directory:
            text, finished = Path(directory) / "region.txt", Path(directory) / f"{key}.pt2"
            text.write_text(str(region.network))
            command = [sys.executable, "-m", "enginery.engine.compile", str(text), str(finished)]
            paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            environment = HOST_EFFORT | os.environ | paths
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
                raise BuildError(f"region {region.name} cannot be compiled: {lines[-1][:300]}", "Use --backend eager")
            return self._cache.publish(key, finished)


def main(text: Path, finished: Path) -> None:
    """Compiles the region whose network is in `text` for the current GPU into the package `finished`."""
    TABLE.load("cuda")
    network = Network.parse(text.read_text())
    files = lower(network, torch.device("cuda"), finished.parent)
    package(files, finished)


def lower(network: Network, device: torch.device, scratch: Path) -> list[Path]:
    """The files that AOTInductor makes of a region: sources for a CPU, a library and kernels for a GPU.

    Raises BuildError if export or Inductor cannot take the region.
    """
    examples, shapes = example_inputs(network, device)
    with _inductor(scratch), torch.no_grad():
        try:
            module = _with_plain_outputs(network).to_graph_module(device)
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
            files: Any = torch._inductor.aot_compile(program.module(), examples, options=_options(device))
        except Exception as error:  # export and Inductor raise errors of many classes
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise BuildError(f"a region cannot be compiled: {line}", "Use --backend eager") from error
    return [Path(file) for file in files]


def example_inputs(network: Network, device: torch.device) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Inputs without content and, for each, which of its sizes are symbolic, as torch.export wants them."""
    sizes: dict[str, int] = {}
    dims: dict[str, Any] = {}
    choices = EXAMPLE_SIZES[device.type]

    def size_of(size: Any) -> int:
        if not isinstance(size, Dim):
            return size
        for symbol in sorted(size.symbols):
            sizes.setdefault(symbol, choices[len(sizes) % len(choices)])
        return int(size.substitute(sizes))  # type: ignore[arg-type]

    def dim_of(size: Any) -> Any:
        if not isinstance(size, Dim):
            return torch.export.Dim.STATIC
        if size.name is None:
            return torch.export.Dim.AUTO
        return dims.setdefault(size.name, torch.export.Dim(size.name, min=1))

    examples = []
    for tensor in network.inputs:
        shape = [size_of(size) for size in tensor.shape]
        examples.append(torch.empty(shape, dtype=tensor.dtype, device=device))
        if not tensor.dtype.is_floating_point:
            examples[-1].zero_()
    shapes = tuple([dim_of(size) for size in tensor.shape] for tensor in network.inputs)
    return tuple(examples), shapes


def _with_plain_outputs(network: Network) -> Network:
    """Results are laid out contiguously: the regions that read them are compiled for that."""
    network = network.copy()
    for name, tensor in zip(network.output_names, network.outputs, strict=True):
        plain = network.call(torch.ops.aten.contiguous.default, tensor)
        network.set_output(name, plain)  # type: ignore[arg-type]
    return network


def _options(device: torch.device) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.precompile_headers": False,
        "cpp.cxx": (None, compiler()),
        "cpp.vec_isa_ok": True,
    }
    if device.type == "cpu":
        wanted["aot_inductor.package_cpp_only"] = True
    else:
        wanted["aot_inductor.emit_multi_arch_kernel"] = False  # the package is for this GPU, and nvcc takes seconds
    return wanted


@contextmanager
def _inductor(scratch: Path) -> Iterator[None]:
    """Inductor writes below `scratch`, which is private, instead of a place in /tmp that anybody could have made."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    former = os.environ.get(name)
    os.environ[name] = str(scratch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if former is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = former


def package(files: Sequence[Path], target: Path) -> Path:
    from torch._inductor.package import package_aoti

    package_aoti(str(target), {MODEL: [str(path) for path in files]})
    return target


def load(path: Path, device: str) -> Run:
    """The compiled region, ready to run. Single-threaded: one step runs at a time, and CUDA graphs can capture it."""
    index = torch.cuda.current_device() if device == "cuda" else -1
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, True, 1, index)
    except RuntimeError as error:
        line = str(error).splitlines()[0][:200]
        raise BuildError(f"compiled region {path} does not load: {line}", f"Remove {path}") from None
    return loader.run


__all__ = ["Compilation", "Run", "load", "lower"]

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
