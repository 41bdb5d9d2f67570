"""Machines that have no GPU, the wrong one or the wrong driver, played by a torch that says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from enginery.engine import gpu
from enginery.engine.code_cache import fingerprint
from enginery.engine.config import BuildConfig
from enginery.errors import DeviceError, EngineryWarning, StepError, UsageError

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """torch as it is on a machine with an H100, but for what is named."""

    def set_up(
        *, cuda: str | None = "13.0", failure: str = "", capability: tuple[int, int] = (9, 0), triton: bool = True,
        archs: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_120"), driver: int = 13000,
    ) -> None:  # fmt: skip
        def init() -> None:
            if failure:
                raise RuntimeError(failure)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None and not failure)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(gpu, "find_spec", lambda name: object() if triton else None)

    return set_up


def test_a_good_machine_has_no_obstacle(machine: Machine) -> None:
    machine()
    assert gpu.obstacle() is None
    assert BuildConfig().resolved_device() == "cuda"
    assert BuildConfig(device="cuda").resolved_device() == "cuda"
    assert BuildConfig(device="cpu").resolved_device() == "cpu"


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"


@pytest.mark.parametrize(
    ("facts", "cause", "fix"),
    [
        ({"cuda": None}, "is built without CUDA", "Install a CUDA build of torch, or use --device cpu"),
        ({"failure": NO_DRIVER}, "there is no NVIDIA driver", "--gpus all, or use --device cpu"),
        ({"failure": TOO_OLD, "driver": 12040}, "too old (it supports CUDA 12.4); torch", "Update the driver"),
        ({"failure": "No CUDA GPUs are available"}, "No CUDA GPUs are available", "Look at `nvidia-smi`"),
        ({"capability": (7, 5)}, "a fake GPU has compute capability 7.5 and compiled engines need 8.0", "--device cpu"),
        ({"capability": (12, 1), "archs": ("sm_80", "sm_90")}, "no code for a fake GPU", "Install a torch built"),
        ({"triton": False}, "Triton is not installed", "or use --backend eager (slow) or --device cpu"),
    ],
)  # fmt: skip
def test_cuda_that_cannot_be_is_one_line_with_its_fix(
    machine: Machine, facts: dict[str, object], cause: str, fix: str
) -> None:
    machine(**facts)
    with pytest.raises(UsageError) as raised:
        BuildConfig(device="cuda").resolved_device()
    assert cause in raised.value.cause
    assert fix in raised.value.fix
    assert "\n" not in str(raised.value)


def test_hidden_gpus_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(failure="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"CUDA_VISIBLE_DEVICES='' hides every GPU. Unset it"):
        BuildConfig(device="cuda").resolved_device()


@pytest.mark.parametrize("facts", [{"capability": (7, 5)}, {"failure": TOO_OLD}, {"triton": False}])
def test_auto_says_why_a_gpu_stays_idle(machine: Machine, facts: dict[str, object]) -> None:
    machine(**facts)
    with pytest.warns(EngineryWarning, match="the GPU is not used: "):
        assert BuildConfig().resolved_device() == "cpu"


@pytest.mark.parametrize("facts", [{"cuda": None}, {"failure": NO_DRIVER}])
@pytest.mark.filterwarnings("error")
def test_auto_is_silent_where_there_is_none(machine: Machine, facts: dict[str, object]) -> None:
    machine(**facts)
    assert BuildConfig().resolved_device() == "cpu"


def test_the_eager_backend_needs_neither_triton_nor_a_recent_gpu(machine: Machine) -> None:
    machine(capability=(7, 5), triton=False)
    assert BuildConfig(backend="eager").resolved_device() == "cuda"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 9), ("sm_80",), True),  # a newer GPU of the same major version
        ((8, 0), ("sm_86",), False),
        ((10, 0), ("sm_80", "sm_90a"), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((9, 0), (), True),  # a torch that does not say
    ],
)
def test_code_for_an_architecture(
    machine: Machine, capability: tuple[int, int], archs: tuple[str, ...], runs: bool
) -> None:
    machine(capability=capability, archs=archs)
    assert (gpu.obstacle() is None) == runs


def test_out_of_memory_names_the_flags() -> None:
    error = gpu.step_error("region layer", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not isinstance(error, DeviceError)
    assert "region layer ran out of GPU memory: CUDA out of memory" in error.cause
    assert "--max-num-batched-tokens" in error.fix


def test_a_lost_device_is_told_from_a_failed_step() -> None:
    text = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
    lost = gpu.step_error("region layer", RuntimeError(text))
    assert isinstance(lost, DeviceError)
    assert "CUDA_LAUNCH_BLOCKING=1" in lost.fix
    assert "\n" not in str(lost)
    for other in (RuntimeError("shapes do not fit"), MemoryError(), RuntimeError("")):
        assert type(gpu.step_error("region layer", other)) is StepError
    assert "another GPU" in str(
        gpu.step_error("region layer", RuntimeError("CUDA error: no kernel image is available"))
    )


def test_compiled_code_belongs_to_one_gpu_and_one_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    known = {fingerprint("cuda")}
    for name, value in (("get_device_name", "another GPU"), ("get_device_capability", (10, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        known.add(fingerprint("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    known |= {fingerprint("cuda"), fingerprint("cpu")}
    assert len(known) == 5
