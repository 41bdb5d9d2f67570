"""Whether this process can use a GPU and why not, and what the errors of a device mean.

torch is imported inside: configurations are read by commands that never load it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from enginery.errors import DeviceError, StepError

MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 and asynchronous copies, which the kernels use"""

_CPU = "or use --device cpu"
_LOST = (
    "illegal memory access", "illegal address", "illegal instruction", "misaligned address", "device-side assert",
    "unspecified launch failure", "launch timed out", "uncorrectable ECC", "hardware stack error", "GPU is lost",
)  # fmt: skip
"""Parts of CUDA's messages after which every call of the process fails."""


@dataclass(frozen=True)
class Obstacle:
    """Why the GPU cannot be used, and what to do."""

    cause: str
    fix: str
    has_gpu: bool = False
    """There is one, so that a user would wonder why it is idle."""


def obstacle(backend: str = "compiled") -> Obstacle | None:
    """What keeps an engine of that backend from running on the current GPU, or nothing."""
    return _no_device() or _foreign_code() or (_no_kernels() if backend == "compiled" else None)


def _no_device() -> Obstacle | None:
    import torch

    if torch.version.cuda is None:
        return Obstacle(
            f"torch finds no CUDA device: torch {torch.__version__} is built without CUDA",
            f"Install a CUDA build of torch, {_CPU}",
        )
    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return Obstacle(f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", f"Unset it, {_CPU}")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _no_driver(str(error))
    return Obstacle("torch finds no CUDA device", f"Look at `nvidia-smi`, {_CPU}")


def _no_driver(message: str) -> Obstacle:
    import torch

    if "too old" in message:
        known = driver_version()
        supports = f" (it supports CUDA {known})" if known else ""
        return Obstacle(
            f"the NVIDIA driver is too old{supports}; torch {torch.__version__} needs CUDA {torch.version.cuda}",
            f"Update the driver or install a torch for it, {_CPU}",
            has_gpu=True,
        )
    if "no NVIDIA driver" in message:
        return Obstacle(
            "torch finds no CUDA device: there is no NVIDIA driver",
            f"Install it, or start the container with --gpus all, {_CPU}",
        )
    return Obstacle(f"torch finds no CUDA device: {first_line(message)}", f"Look at `nvidia-smi`, {_CPU}")


def _foreign_code() -> Obstacle | None:
    """torch brings machine code for some architectures; within a major version a newer GPU runs an older one's, and
    any newer GPU can compile PTX (`compute_`)."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    known = torch.cuda.get_arch_list()
    for name in known:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        version = (int(digits[:-1]), int(digits[-1]))
        if version <= (major, minor) and (kind == "compute" or version[0] == major):
            return None
    if not known:
        return None
    return Obstacle(
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name()} (compute capability "
        f"{major}.{minor}), only for {', '.join(known)}",
        f"Install a torch built for it, {_CPU}",
        has_gpu=True,
    )


def _no_kernels() -> Obstacle | None:
    """Compiled regions and our kernels want a recent architecture and Triton."""
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return Obstacle(
            f"{torch.cuda.get_device_name()} has compute capability {found} and compiled engines need {least}",
            "Use --device cpu, or --backend eager (slow)",
            has_gpu=True,
        )
    if find_spec("triton") is None:
        return Obstacle(
            "Triton is not installed, and GPU code is compiled with it",
            "Install the triton that this torch names, or use --backend eager (slow) or --device cpu",
            has_gpu=True,
        )
    return None


def driver_version() -> str:
    """The newest CUDA that the driver supports, such as "12.4"; empty if nobody answers."""
    import torch

    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    try:
        number = ask() if ask is not None else 0
    except RuntimeError:
        number = 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def step_error(what: str, error: BaseException) -> StepError:
    """What a failure of `what` ("region layer") means to the user: memory, a lost device, or a step that failed."""
    import torch

    line = first_line(str(error) or type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in line:
        return StepError(
            f"{what} ran out of GPU memory: {line}",
            "Lower --max-num-batched-tokens, --max-num-seqs or --kv-cache-memory",
        )
    if any(text in str(error) for text in _LOST):
        return DeviceError(
            f"the GPU failed in {what}: {line}", "Start again; CUDA_LAUNCH_BLOCKING=1 makes the error name its kernel"
        )
    if "no kernel image" in line:
        return StepError(f"{what} was compiled for another GPU", "Remove the directory regions of ENGINERY_CACHE")
    return StepError(f"{what} failed: {line}", "See ENGINERY_DEBUG")


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300].rstrip(".") if text.strip() else ""


__all__ = ["MIN_CAPABILITY", "Obstacle", "driver_version", "obstacle", "step_error"]
