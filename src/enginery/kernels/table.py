"""Which kernel runs which op on which device: the one module that others import kernels through, and it prints.

    print(TABLE)         every op on every device of this machine, the kernel chosen, or why it is the reference
    TABLE.load("cpu")    makes the chosen kernels those that torch's dispatcher calls; again: does nothing

What is loaded is known by the dispatcher alone; there is no state here. Without a kernel an op runs by its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from enginery.errors import BuildError
from enginery.kernels import compile as compiling
from enginery.kernels.cpu_features import cpu_flags, instruction_set
from enginery.ops import NAMESPACE, OPS

NO_KERNEL = "no kernel for this device"

Report = Callable[[str], None]
"""Receives one line when work begins that a user waits for."""


@dataclass(frozen=True)
class Candidate:
    """Kernels of one family on one device. `unavailable()` gives the reason why they cannot run here, or nothing."""

    name: Callable[[], str]
    device: str
    ops: frozenset[str]
    unavailable: Callable[[], str]
    load: Callable[[Report | None], None]
    measuring: Callable[[], AbstractContextManager[None]] = nullcontext
    """Once it is loaded: a context within which it measures what it has to choose from, and keeps the choice."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `kernel` is "reference" where nothing faster runs; `reason` says why."""

    op: str
    device: str
    kernel: str
    reason: str = ""

    @property
    def is_missing(self) -> bool:
        """There is a kernel for this device, but it could not be loaded."""
        return self.kernel == "reference" and self.reason != NO_KERNEL


@dataclass(frozen=True)
class KernelTable:
    candidates: tuple[Candidate, ...]

    def rows(self, device: str) -> list[Row]:
        """What the dispatcher would run for each op on `device` now. Compiles and loads nothing."""
        return [self._row(op.name, device) for op in OPS]

    def load(self, device: str, report: Report | None = None) -> list[Row]:
        """Loads the kernels of `device` that are not yet loaded; returns its rows. Never fails: rows say why not."""
        failures: dict[str, str] = {}
        for candidate in self.candidates:
            missing = [op for op in candidate.ops if not _is_loaded(op, device)]
            if candidate.device != device or not missing or candidate.unavailable():
                continue
            try:
                candidate.load(report)
            except BuildError as error:
                failures |= dict.fromkeys(missing, str(error))
        return [self._row(op.name, device, failures.get(op.name, "")) for op in OPS]

    @contextmanager
    def measuring(self, device: str) -> Iterator[None]:
        """Within, the loaded kernels of `device` measure what they can choose from when a call of a size is new."""
        with ExitStack() as stack:
            for candidate in self.candidates:
                if candidate.device == device and any(_is_loaded(op, device) for op in candidate.ops):
                    stack.enter_context(candidate.measuring())
            yield

    def _row(self, op: str, device: str, failure: str = "") -> Row:
        candidate = next((each for each in self.candidates if each.device == device and op in each.ops), None)
        if candidate is None:
            return Row(op, device, "reference", NO_KERNEL)
        if _is_loaded(op, device):
            return Row(op, device, candidate.name())
        reason = failure or candidate.unavailable() or f"{candidate.name()} is not loaded yet"
        return Row(op, device, "reference", reason)

    def __str__(self) -> str:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        rows = [row for place in devices for row in self.rows(place)]
        op, device, kernel = (max(len(getattr(row, name)) for row in rows) for name in ("op", "device", "kernel"))
        lines = [f"{row.op:{op}}  {row.device:{device}}  {row.kernel:{kernel}}  {row.reason}" for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _is_loaded(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", device.upper())


def _load_cpp(report: Report | None) -> None:
    library = compiling.library(report=report)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"the compiled kernels do not load: {error}", f"Remove {library.parent}") from None


CPP = Candidate(
    name=lambda: f"C++ {instruction_set(cpu_flags())}",
    device="cpu",
    ops=frozenset(
        {"attention", "expert_linear", "pack_linear", "packed_embedding", "packed_linear", "paged_attention"}
    ),
    unavailable=compiling.missing_compiler,
    load=_load_cpp,
)


def _missing_gpu(needed: tuple[int, int]) -> str:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    found = torch.cuda.get_device_capability()
    if found < needed:
        return "compute capability {}.{}, the kernels need {}.{}".format(*found, *needed)
    return ""


def _missing_triton() -> str:
    return _missing_gpu((8, 0)) or ("" if find_spec("triton") is not None else "Triton is not installed")


def _load_triton(_: Report | None) -> None:
    try:
        from enginery.kernels.triton.register import register
    except ImportError as error:
        raise BuildError(f"Triton does not load: {error}", "Install the triton of this torch") from None
    register()


def _measuring_cublas() -> AbstractContextManager[None]:
    from enginery.kernels.triton.register import measuring

    return measuring()


TRITON = Candidate(
    name=lambda: "Triton",
    device="cuda",
    ops=frozenset(
        {"add_rms_norm", "greatest", "linear", "norm_linear", "paged_attention", "rotary_paged_attention", "silu_mul"}
    ),
    unavailable=_missing_triton,
    load=_load_triton,
    measuring=_measuring_cublas,
)


TABLE = KernelTable((CPP, TRITON))

__all__ = ["CPP", "TABLE", "TRITON", "Candidate", "KernelTable", "Report", "Row"]
