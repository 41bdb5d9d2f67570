"""What runs while regions are compiled: the calls that the compiled steps of the usual shapes will make."""

from __future__ import annotations

import dataclasses
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from tests.engine.decoder import Decoder, imported, reader
from torch.utils._python_dispatch import TorchDispatchMode

from enginery import ops
from enginery.engine import warming
from enginery.engine.buckets import Buckets
from enginery.engine.builder import build
from enginery.engine.code_cache import CodeCache
from enginery.engine.compile import HOST_EFFORT, Compilation
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.engine.graphs import LaunchedStep, empty_step, largest_step
from enginery.engine.inputs import InputBuffer, StepShape
from enginery.engine.steps import CompiledStep
from enginery.engine.warming import warm
from enginery.errors import BuildError


class Calls(TorchDispatchMode):
    """The distinct calls of our operators as a kernel that is compiled for its arguments tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[Any, ...]] = set()
        self.count = 0

    @property
    def names(self) -> set[str]:
        return {call[0] for call in self.made}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "enginery":
            given = [*args, *(kwargs or {}).values()]
            self.made.add((function.name(), *map(described, given)))
            self.count += 1
        return function(*args, **(kwargs or {}))


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # The number of blocks is no matter: kernels see the strides of a pool.
        shape = ("blocks", *value.shape[1:]) if value.dim() == 4 and value.shape[2] == 16 else tuple(value.shape)
        return shape, value.stride(), value.dtype, value.data_ptr() % 16
    return tuple(value) if isinstance(value, list) else value


def test_warming_makes_the_calls_of_compiled_steps(compiled: Engine) -> None:
    with Calls() as warmed:
        warm(compiled.regions, compiled.plan)
    buffer = InputBuffer(compiled.limits, torch.device("cpu"))
    fixed = compiled._weights | compiled._pools
    launched = LaunchedStep(CompiledStep(compiled.regions, compiled._runs, fixed, compiled._step_inputs), buffer)
    shapes = [largest_step(compiled.limits), *Buckets.of(compiled.limits).at_open()]
    assert len(shapes) > 5
    with Calls() as run:
        for shape in shapes:
            buffer.send(empty_step(), shape)
            ops.greatest(launched.run(shape))  # as a sampler does
    assert run.names == {"enginery::paged_attention", "enginery::packed_linear", "enginery::greatest"}
    assert warmed.made == run.made


@pytest.mark.parametrize("shape", [(64, 8), (8, 8), (1, 1)])
def test_a_rehearsal_makes_the_calls_of_the_whole_step(compiled: Engine, shape: tuple[int, int]) -> None:
    tokens, sequences = shape
    buffer = InputBuffer(compiled.limits, torch.device("cpu"))
    rehearsed, launched = (
        LaunchedStep(compiled._compiled(regions), buffer) for regions in (compiled.regions.folded(), compiled.regions)
    )
    buffer.send(empty_step(), StepShape(tokens, sequences, 4, sequences))
    made = []
    for step in (rehearsed, launched):
        with Calls() as calls:
            logits = step.run(StepShape(tokens, sequences, 4, sequences))
        assert logits.shape == (sequences, compiled.limits.vocab_size)
        made.append(calls)
    assert made[0].made == made[1].made
    assert made[0].count < made[1].count


def test_warming_goes_on_where_memory_is_too_small_for_a_shape(
    compiled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def too_large(_: Any, inputs: warming.Values) -> torch.Tensor:
        rows.append(len(inputs["token_ids"]))
        if len(inputs["token_ids"]) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1, 2)

    monkeypatch.setattr(warming.OperatorStep, "__call__", too_large)
    warm(compiled.regions, compiled.plan)
    assert max(rows) > 32
    assert min(rows) == 1


def test_warming_never_fails(compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def broken(_: Any, inputs: warming.Values) -> None:
        steps.append("step")
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(warming.OperatorStep, "__call__", broken)
    warm(compiled.regions, compiled.plan)
    assert steps == ["step"]  # nor tries again


def test_warming_takes_no_more_memory_than_the_kv_cache_will(compiled: Engine) -> None:
    limits = dataclasses.replace(compiled.limits, num_blocks=1)
    with Calls() as warmed:
        warm(compiled.regions, dataclasses.replace(compiled.plan, limits=limits, block=1000))
    assert not warmed.made


# ---- beside the compilers


class Compiler:
    """Stands for the process of a region: ends when what runs meanwhile has begun."""

    def __init__(self) -> None:
        self.meanwhile = threading.Event()
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert self.meanwhile.wait(20)
        self.environments.append(env)
        Path(command[-1]).write_text("compiled")
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr("enginery.engine.compile.subprocess.run", compiler)
    return compiler


def test_warming_runs_beside_the_compilers_of_a_gpu(compiled: Engine, compiler: Compiler, tmp_path: Path) -> None:
    cache = CodeCache("0" * 16, tmp_path / "cache")
    compilation = Compilation(cache, "cuda")
    compilation.start(compiled.regions.distinct, compiler.meanwhile.set)
    assert compilation.wait().keys() == compiled.regions.distinct.keys()
    compiler.meanwhile.clear()
    again = Compilation(cache, "cuda")
    again.start(compiled.regions.distinct, compiler.meanwhile.set)
    again.wait()
    assert not compiler.meanwhile.is_set()  # nothing was compiled


def test_host_code_for_a_gpu_is_compiled_quickly(
    compiled: Engine, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, effort),) = HOST_EFFORT.items()
    assert name in Path(torch._inductor.config.__file__).read_text()
    for expected, number in ((effort, "0"), ("O2", "1")):
        compilation = Compilation(CodeCache(number * 16, tmp_path / "cache"), "cuda")
        compilation.start(compiled.regions.distinct, compiler.meanwhile.set)
        compilation.wait()
        assert compiler.environments.pop()[name] == expected
        monkeypatch.setenv(name, "O2")  # of the user's own


def test_a_cpu_is_not_warmed(compiled: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError

    def refuse_region(*_: object) -> None:
        raise BuildError("no region")

    monkeypatch.setattr("enginery.engine.compile.lower", refuse_region)
    compilation = Compilation(CodeCache("0" * 16, tmp_path / "cache"), "cpu")
    with pytest.raises(BuildError, match="no region"):
        compilation.start(compiled.regions.distinct, refuse)
    compilation.close()


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_capture_compiles_nothing_that_was_warmed(
    in_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    config = BuildConfig(max_num_seqs=48, max_num_batched_tokens=256, device="cuda", kv_cache_memory=64 << 20)
    model = Decoder()
    engine = build(imported(model), reader(model), config, tmp_path / "engine")
    engine.close()

    compiled: list[str] = []
    capturing: list[bool] = []
    knobs = triton.knobs.runtime
    monkeypatch.setattr(knobs, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    monkeypatch.setattr(
        knobs, "kernel_load_start_hook", lambda *_: capturing.append(torch.cuda.is_current_stream_capturing())
    )
    forget_kernels(triton)
    warm(engine.regions, engine.plan)
    assert any("attend_short" in name for name in compiled)
    compiled.clear()
    Engine.load(tmp_path / "engine", config).close()
    assert compiled == []

    forget_kernels(triton)
    capturing.clear()
    engine = Engine.load(tmp_path / "engine", config)
    assert len(engine._run) == len(list(engine._run.buckets.at_open()))  # type: ignore[arg-type, union-attr]
    engine.close()
    assert len(capturing) > 5
    assert not any(capturing)


def forget_kernels(triton: Any) -> None:
    """Those of the tests before."""
    from enginery.kernels.triton import add_rms_norm, attention_kernels, float8, greatest, linear, silu_mul

    for module in (add_rms_norm, attention_kernels, float8, greatest, linear, silu_mul):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
