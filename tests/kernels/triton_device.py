"""Where Triton kernels run in tests: on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

NARROW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
"""what NumPy does not have, by Triton's names"""
TORCH_DTYPES = {**NARROW, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def pretend(monkeypatch: pytest.MonkeyPatch, module: ModuleType, processors: int, capability: tuple[int, int]) -> None:
    """What this module plans is for such a GPU; launches are for the one that there is."""
    from enginery.kernels.triton.gpu import Gpu

    monkeypatch.setattr(module, "Gpu", SimpleNamespace(of=lambda device: Gpu(processors, capability)))


def check_replays(call: Callable[[], torch.Tensor], change: Callable[[], object], times: int) -> None:
    """A graph that holds the call gives what the call gives, after every `change` of its inputs."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for _ in range(times):
        change()
        graph.replay()
        assert torch.equal(output, call())


@contextmanager
def kernels_for_device() -> Iterator[None]:
    """Import kernels inside: without a GPU, they are made for the interpreter. The environment stays as it was."""
    if DEVICE.type == "cuda":
        yield
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        _interpret_library()
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _interpret_library() -> None:
    """Makes Triton's own functions (`tl.sum`, ...) interpretable, whoever imported Triton before."""
    import triton.experimental.gluon  # noqa: F401  imported at the first call otherwise, when the environment is restored
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard, tl.core):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(function.fn))

    if not hasattr(interpreter, "_mended"):
        interpreter._mended = True
        _mend(interpreter)


def _mend(interpreter) -> None:
    """NumPy 2.4 takes no `[1]` array for an index, and the interpreter multiplies bfloat16 matrices as if integers. Its
    roundings truncate, or lose what they carry into the exponent: torch rounds as a GPU does."""
    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_and_index(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert(data, source, target, _rounding_mode):
        values = torch.from_numpy(np.array(data)).view(TORCH_DTYPES[source.name])
        return values.to(TORCH_DTYPES[target.name]).view(UNSIGNED[target.primitive_bitwidth]).numpy()

    def widen(handle):
        if handle.dtype.name not in NARROW:
            return handle
        wide = convert(handle.data, handle.dtype, triton.language.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, triton.language.float32)

    def create_wide_dot(self, left, right, *rest):
        return create_dot(self, widen(left), widen(right), *rest)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_wide_dot
