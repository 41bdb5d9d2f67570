"""An engine that is open: weights mapped, KV pools allocated, regions loaded. What a session runs steps on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from enginery import env, ops
from enginery.engine.artifact import Artifact, open_artifact
from enginery.engine.code_cache import CodeCache, fingerprint
from enginery.engine.compile import Compilation, Run, load
from enginery.engine.config import BuildConfig
from enginery.engine.gpu import obstacle
from enginery.engine.graphs import GraphedStep, LaunchedStep, empty_step, largest_step
from enginery.engine.inputs import InputBuffer, StepShape
from enginery.engine.manifest import Facts, Manifest
from enginery.engine.memory import TOO_LARGE, MemoryPlan, caches, measured_plan, plan_memory, pool_shape
from enginery.engine.protocol import EngineLimits, Progress, StepInputs
from enginery.engine.regions import Outline, outline
from enginery.engine.steps import CompiledStep, EagerStep, HostStep, Step
from enginery.engine.transfer import Transfer
from enginery.engine.warming import warm
from enginery.errors import EngineryWarning, ResourceError, StepError, UsageError
from enginery.kernels.table import TABLE, Row
from enginery.network import Network, Tensor


@dataclass(frozen=True)
class Parts:
    """All that an engine is made of, on disk or in memory."""

    network: Network
    manifest: Manifest
    weights: Mapping[str, torch.Tensor]
    directory: Path | None

    @classmethod
    def of(cls, artifact: Artifact) -> Parts:
        return cls(artifact.network, artifact.manifest, artifact.weights(), artifact.directory)

    @cached_property
    def regions(self) -> Outline:
        return outline(self.network)


class Engine:
    """Satisfies `protocol.Engine`. Made by `Engine.load` and `builder.build`. One thread at a time.

    Attributes:
        directory: where it was loaded from; None for an engine that was never written.
        facts: of the model.
        plan: how its device's memory is divided.
        regions: how the network was cut.
    """

    def __init__(self, parts: Parts, config: BuildConfig, progress: Progress | None = None) -> None:
        _set_threads()
        self.directory = parts.directory
        self.facts: Facts = parts.manifest.facts
        self.manifest = parts.manifest
        self.backend = config.backend
        self.device = torch.device(parts.manifest.device)
        self.regions: Outline = parts.regions
        self.plan: MemoryPlan = plan_memory(parts.network, self.regions, self.facts, config, self.device.type)
        warn_of_references(TABLE.load(self.device.type))
        self._network = parts.network
        self._pools: dict[str, torch.Tensor] = {}
        self._runs: dict[str, Run] = {}
        self._run: Callable[[StepInputs], torch.Tensor] | None
        with self._transfer(parts.weights) as weights:
            self._weights = weights.placed
            if config.backend == "compiled":
                warming = partial(warm, self.regions, self.plan)
                packages = compile_regions(self.regions, self.device.type, progress, warming)
                self._runs = {key: load(path, self.device.type) for key, path in packages.items()}
            self._run = self._open_host() if self.device.type == "cpu" else self._open_gpu(config, progress)
            weights.wait()

    def _transfer(self, weights: Mapping[str, torch.Tensor]) -> Transfer:
        try:
            return Transfer(weights, self.device)
        except torch.OutOfMemoryError:
            raise ResourceError(
                f"the weights of {self.plan.weights / 2**30:.2f} GiB do not fit on {self.device}", TOO_LARGE
            ) from None

    def _open_host(self) -> HostStep:
        return HostStep(self._step(), [tensor.name for tensor in self._step_inputs])

    def _open_gpu(self, config: BuildConfig, progress: Progress | None) -> LaunchedStep | GraphedStep:
        """Sizes the KV cache by what the largest step really takes, then captures the usual steps.

        The weights may still be on their way: no value that a step computes here is kept.
        """
        buffer = InputBuffer(self.limits, self.device)
        if config.backend == "eager":
            return LaunchedStep(self._step(), buffer)
        self.plan = measured_plan(self.plan, config, self._measure_activations(buffer))
        launched = LaunchedStep(self._step(), buffer)
        rehearsed = LaunchedStep(self._compiled(self.regions.folded()), buffer)
        graphed = GraphedStep(launched, rehearsed, buffer, self.limits)
        before = torch.cuda.memory_reserved()
        shapes = list(graphed.buckets.at_open())
        for done, _ in enumerate(graphed.capture(shapes)):
            if progress is not None:
                progress("capture", done, len(shapes))
        limits = replace(self.limits, step_sizes=graphed.buckets.mixed_with(self.limits.max_num_seqs))
        self.plan = replace(self.plan, limits=limits, graphs=max(0, torch.cuda.memory_reserved() - before))
        if progress is not None:
            progress("capture", len(shapes), len(shapes))
        return graphed

    def _measure_activations(self, buffer: InputBuffer) -> int:
        """Bytes of intermediate values in a step as large as the limits allow; its cache is one block."""
        shape = largest_step(self.limits)
        launched = LaunchedStep(self._step(num_blocks=1), buffer)
        buffer.send(empty_step(), shape)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            ops.greatest(launched.run(shape))  # what a sampler asks first: no request waits for its kernel
        except StepError as error:
            raise ResourceError(
                f"a step of {shape.tokens} tokens does not run: {error}",
                "Lower --max-num-batched-tokens or --max-num-seqs",
            ) from error
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        self._pools = {}
        del launched
        torch.cuda.empty_cache()
        return peak

    @property
    def _step_inputs(self) -> list[Tensor]:
        """What changes from step to step."""
        pools = {tensor.name for tensor in caches(self._network)}
        return [tensor for tensor in self._network.inputs if tensor.name not in pools]

    def _step(self, num_blocks: int | None = None) -> Step:
        """The network over the weights and fresh KV pools."""
        self._pools = self._allocate(num_blocks or self.limits.num_blocks)
        if self.backend == "eager":
            return EagerStep(self._network, self._weights | self._pools, self._step_inputs)
        return self._compiled(self.regions)

    def _compiled(self, regions: Outline) -> CompiledStep:
        return CompiledStep(regions, self._runs, self._weights | self._pools, self._step_inputs)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        config: BuildConfig | None = None,
        *,
        trust_engine_code: bool = False,
        progress: Progress | None = None,
    ) -> Engine:
        """Opens an engine directory, every byte of which is verified.

        Compiled regions come from the user's cache, or from the directory if this user compiled them there (or
        `trust_engine_code`), or are compiled now into the cache.

        Raises:
            EngineFileError: the directory is not what was built, or of another format; others may write the cache.
            BuildError: a region could not be compiled.
            UsageError: the configuration asks for another dtype or device than the engine was built for.
            ResourceError: the device's memory is too small; says what would fit.
        """
        config = config or BuildConfig()
        artifact = open_artifact(Path(directory), weights=False)
        manifest = artifact.manifest
        _require_same(manifest, config, Path(directory))
        with artifact.verifying_weights(progress):
            parts = Parts.of(artifact)
            plan_memory(parts.network, parts.regions, manifest.facts, config, manifest.device)  # before the work
            if config.backend == "compiled":
                cache = CodeCache(fingerprint(manifest.device))
                cache.adopt(artifact.kernels(cache.fingerprint), trust=trust_engine_code)
                if artifact.is_foreign(cache.fingerprint) and not all(map(cache.find, parts.regions.distinct)):
                    warnings.warn(
                        f"{directory} was compiled for another machine, torch or Enginery: its regions are compiled "
                        "again, once",
                        EngineryWarning,
                        stacklevel=2,
                    )
            return cls(parts, config, progress)

    @classmethod
    def open(cls, artifact: Artifact, config: BuildConfig, progress: Progress | None = None) -> Engine:
        """Opens an artifact that has been verified, or was just written."""
        return cls(Parts.of(artifact), config, progress)

    @property
    def limits(self) -> EngineLimits:
        return self.plan.limits

    @property
    def is_asynchronous(self) -> bool:
        return self.device.type == "cuda"

    def execute(self, inputs: StepInputs) -> torch.Tensor:
        """Runs one step: logits `[L, vocab_size]`, valid until the next call.

        Raises StepError if the batch is not one of this engine's limits, or names what failed.
        """
        if self._run is None:
            raise StepError("the engine is closed", "Load it again")
        check_inputs(inputs, self.limits)
        return self._run(inputs)[: len(inputs.logits_indices)]

    def replayed(self, inputs: StepInputs) -> StepShape | None:
        """The padded shape that a step was replayed in, to be asked after it; None: it was launched as it is."""
        return self._run.replayed(inputs) if isinstance(self._run, GraphedStep) else None

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        if not pairs:
            return
        last = self.limits.num_blocks - 1
        if any(not 0 <= block <= last for pair in pairs for block in pair):
            raise StepError(f"a block to copy is outside 0..{last}")
        sides = torch.tensor(pairs)
        if self.device.type == "cuda":
            sides = sides.pin_memory().to(self.device, non_blocking=True)
        sources, targets = sides.unbind(1)
        for pool in self._pools.values():
            pool[targets] = pool[sources]

    def close(self) -> None:
        """Frees weights, KV pools and compiled code."""
        self._run = None
        self._runs = {}
        self._pools = {}
        self._weights = {}

    def summary(self) -> dict[str, Any]:
        """What was built, in JSON types."""
        return {
            "directory": None if self.directory is None else str(self.directory),
            "backend": self.backend,
            "device": str(self.device),
            "facts": asdict(self.facts),
            "limits": asdict(self.limits),
            "memory": {
                "weights": self.plan.weights,
                "activations": self.plan.working,
                "kv_cache": self.plan.kv_cache,
                "available": self.plan.available,
            },
            "phases": list(self.manifest.phases),
            "regions": {region.name: len(region.network) for region in self.regions.distinct.values()},
        }

    def __str__(self) -> str:
        title = f"{self.facts.architecture}, {self.facts.dtype}, {self.backend} on {self.device}"
        return "\n".join([title, str(self.regions), str(self.plan), f"in {self.directory or 'memory'}"])

    def _allocate(self, num_blocks: int) -> dict[str, torch.Tensor]:
        """Zeroed KV pools by name."""
        pools = caches(self._network)
        try:
            return {pool.name: _zeros((num_blocks, *pool_shape(pool)), pool.dtype, self.device) for pool in pools}
        except (torch.OutOfMemoryError, MemoryError):
            raise ResourceError(
                f"the KV cache of {self.plan.kv_cache >> 20} MiB cannot be allocated on {self.device}",
                "Lower --kv-cache-memory",
            ) from None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU a page is taken when it is first written; torch.zeros would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def warn_of_references(rows: Sequence[Row]) -> None:
    """Says once why kernels that this device should have are not there; their ops run by slow references."""
    reason = next((row.reason for row in rows if row.is_missing), None)
    if reason is not None:
        warnings.warn(f"kernels are missing, so the engine is slow: {reason}", EngineryWarning, stacklevel=4)


def compile_regions(
    regions: Outline, device: str, progress: Progress | None = None, meanwhile: Callable[[], None] | None = None
) -> dict[str, Path]:
    """The compiled form of each distinct region, from the user's cache or compiled now into it; `meanwhile`: see
    `Compilation.start`.
    """
    compilation = Compilation(CodeCache(fingerprint(device)), device, progress)
    try:
        compilation.start(regions.distinct, meanwhile)
        return compilation.wait()
    finally:
        compilation.close()


def check_inputs(inputs: StepInputs, limits: EngineLimits) -> None:
    """Raises StepError for a batch that would read or write outside of the engine's tensors."""
    tokens, sequences = len(inputs.token_ids), len(inputs.seq_lens)
    if not 1 <= tokens <= limits.max_num_tokens:
        raise StepError(
            f"a step of {tokens} tokens is outside 1..{limits.max_num_tokens}", "See --max-num-batched-tokens"
        )
    lengths = (len(inputs.positions), len(inputs.slot_mapping), int(inputs.query_start[-1]))
    if lengths != (tokens, tokens, tokens) or len(inputs.query_start) != sequences + 1 != len(inputs.block_tables) + 1:
        raise StepError("the arrays of a step disagree about its tokens or sequences")
    longest = int(inputs.seq_lens.max())
    bounds = (
        ("token id", inputs.token_ids, 0, limits.vocab_size),
        ("position", inputs.positions, 0, limits.max_model_len),
        ("slot", inputs.slot_mapping, -1, limits.num_blocks * limits.block_size),
        ("block", inputs.block_tables, 0, limits.num_blocks),
        ("logits index", inputs.logits_indices, 0, tokens),
        ("sequence length", inputs.seq_lens, 0, inputs.block_tables.shape[1] * limits.block_size + 1),
    )
    for name, values, low, high in bounds:
        if values.size and (int(values.min()) < low or int(values.max()) >= high):
            raise StepError(f"a {name} of the step is outside {low}..{high - 1}")
    if longest > limits.max_model_len or bool(np.any(np.diff(inputs.query_start) < 0)):
        raise StepError("the sequence lengths of a step are impossible")


def _require_same(manifest: Manifest, config: BuildConfig, directory: Path) -> None:
    if config.dtype not in ("auto", manifest.facts.dtype):
        raise UsageError(
            f"{directory} was built in {manifest.facts.dtype}, not {config.dtype}",
            "Leave --dtype out, or build it again",
        )
    quantization = manifest.config.get("quantization")
    if config.quantization not in (None, quantization):
        raise UsageError(
            f"{directory} was built with quantization {quantization}, not {config.quantization}",
            "Leave --quantization out, or build it again",
        )
    if config.device not in ("auto", manifest.device):
        raise UsageError(
            f"{directory} was built for {manifest.device}, not {config.device}", "Leave --device out, or build it again"
        )
    found = obstacle(config.backend) if manifest.device == "cuda" else None
    if found is not None:
        raise UsageError(f"{directory} was built for cuda: {found.cause}", found.fix)


def _set_threads() -> None:
    """Threads of the CPU kernels: ENGINERY_THREADS, or one per physical core that this process may use."""
    threads = env.read_int("ENGINERY_THREADS")
    if threads <= 0 and "OMP_NUM_THREADS" not in os.environ:
        threads = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    if threads > 0:
        torch.set_num_threads(threads)


__all__ = ["Engine", "Parts", "Progress", "check_inputs", "compile_regions"]
