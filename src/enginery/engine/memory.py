"""The memory plan: what an engine needs on its device, and how many KV blocks fit beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from enginery.engine.binding import nbytes
from enginery.engine.config import BLOCK_SIZE, BuildConfig
from enginery.engine.manifest import Facts
from enginery.engine.protocol import EngineLimits
from enginery.engine.regions import Outline
from enginery.errors import ResourceError, UsageError
from enginery.network import Network, Tensor
from enginery.network.dim import evaluate

DEFAULT_TOKENS: Mapping[str, int] = {"cpu": 512, "cuda": 8192}
"""max_num_batched_tokens where the configuration names none; on a GPU so many of prompts, beside all that decode: what
a long prompt leaves over would cost a step of its own"""
KV_SHARE: Mapping[str, float] = {"cpu": 0.6, "cuda": 0.95}
"""part of what weights and activations leave that the KV cache takes where the configuration names no size"""
KV_REASONABLE = 4 << 30
"""bytes of main memory beyond which a KV cache has to be asked for, unless one sequence needs more"""
TOO_LARGE = "Free the GPU (`nvidia-smi` names who uses it), lower --max-num-batched-tokens, or use --quantization fp8"
SAMPLING_COPIES = 4
"""of the logits, at most, while tokens are drawn from them"""
SPARE_BYTES = 256 << 20
"""left for everything that is not planned"""

_CACHES = ("key_cache.", "value_cache.")
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """All sizes in bytes. `str(plan)` is a table."""

    device: str
    available: int
    """free on the device, without the weights"""
    weights: int
    activations: int
    """peak of the intermediate values of a step of max_num_tokens; on a GPU measured when the engine opens"""
    block: int
    """one KV block of all layers"""
    limits: EngineLimits
    sampling: int = 0
    """copies of the logits that sampling makes on a GPU"""
    graphs: int = 0
    """memory that captured steps share"""

    @property
    def working(self) -> int:
        """What steps need beside weights and cache."""
        return self.activations + self.sampling + self.graphs

    @property
    def kv_cache(self) -> int:
        return self.block * self.limits.num_blocks

    @property
    def total(self) -> int:
        return self.weights + self.working + self.kv_cache

    def __str__(self) -> str:
        limits = self.limits
        rows = (
            ("weights", self.weights, ""),
            (
                "activations",
                self.activations,
                f"{limits.max_num_tokens} tokens a step, {limits.max_num_seqs} sequences",
            ),
            *([("sampling", self.sampling, "")] if self.sampling else []),
            *([("CUDA graphs", self.graphs, "")] if self.graphs else []),
            (
                "KV cache",
                self.kv_cache,
                f"{limits.num_blocks} blocks of {limits.block_size} tokens, {_human(self.block)} each",
            ),
            ("total", self.total, f"{_human(self.available)} available on {self.device}"),
        )
        return "\n".join(f"{name:12} {_human(size):>10}  {note}".rstrip() for name, size, note in rows)


def caches(network: Network) -> list[Tensor]:
    """The KV pools among a network's inputs."""
    return [tensor for tensor in network.inputs if tensor.name.startswith(_CACHES)]


def pool_shape(cache: Tensor) -> tuple[int, ...]:
    """Of one block of a pool: heads, tokens, size of a head."""
    return tuple(evaluate(size, {}) for size in cache.shape[1:])


def plan_memory(network: Network, outline: Outline, facts: Facts, config: BuildConfig, device: str) -> MemoryPlan:
    """Divides the device's memory. Raises ResourceError where not even one sequence fits, with the length that
    would.
    """
    default = DEFAULT_TOKENS[device] + (config.max_num_seqs if device == "cuda" else 0)
    tokens = config.max_num_batched_tokens or default
    wanted = config.max_model_len or facts.max_position_embeddings
    if wanted > facts.max_position_embeddings:
        raise UsageError(
            f"max_model_len is {wanted}, but the model was made for {facts.max_position_embeddings}",
            f"Set --max-model-len to at most {facts.max_position_embeddings}",
        )
    limits = EngineLimits(facts.vocab_size, wanted, tokens, config.max_num_seqs, 0, BLOCK_SIZE)
    plan = MemoryPlan(
        device,
        available_memory(device),
        sum(map(nbytes, network.constants)),
        activation_bytes(outline, tokens, config.max_num_seqs, facts.vocab_size),
        sum(_block_bytes(cache) for cache in caches(network)),
        limits,
    )
    if device == "cuda":
        plan = _for_gpu(plan, plan.activations)
    return replace(plan, limits=_with_blocks(plan, config))


def measured_plan(plan: MemoryPlan, config: BuildConfig, activations: int) -> MemoryPlan:
    """The plan of a GPU whose weights are loaded, with the activations of the largest step as they were measured."""
    plan = _for_gpu(replace(plan, available=available_memory(plan.device) + plan.weights), activations)
    wanted = replace(plan.limits, max_model_len=config.max_model_len or plan.limits.max_model_len)
    plan = replace(plan, limits=wanted)
    return replace(plan, limits=_with_blocks(plan, config))


def _for_gpu(plan: MemoryPlan, activations: int) -> MemoryPlan:
    """Captured steps share memory as large as their largest needs, which is no larger than the largest step."""
    logits = 4 * plan.limits.vocab_size * min(plan.limits.max_num_seqs, plan.limits.max_num_tokens)
    return replace(plan, activations=activations, sampling=SAMPLING_COPIES * logits, graphs=activations)


def _with_blocks(plan: MemoryPlan, config: BuildConfig) -> EngineLimits:
    limits = plan.limits
    useful = limits.max_num_seqs * -(-limits.max_model_len // limits.block_size) + 1
    memory = config.kv_cache_memory
    room = plan.available - plan.weights - plan.working
    if plan.device == "cuda" and room <= 0:
        raise ResourceError(
            f"weights of {_human(plan.weights)} and {_human(plan.working)} for a step of {limits.max_num_tokens} "
            f"tokens do not fit into {_human(plan.available)} free on {plan.device}",
            TOO_LARGE,
        )
    if memory is None:
        memory = int(KV_SHARE[plan.device] * max(0, room - SPARE_BYTES))
        if plan.device == "cpu":
            longest = -(-limits.max_model_len // limits.block_size) * plan.block
            memory = min(memory, max(KV_REASONABLE, longest))
    elif memory > (room if plan.device == "cuda" else plan.available):
        raise ResourceError(
            f"the KV cache of {_human(memory)} does not fit into {_human(min(room, plan.available))} on {plan.device}",
            "Lower --kv-cache-memory",
        )
    blocks = min(useful, memory // plan.block) if plan.block else useful
    fits = blocks * limits.block_size
    if fits >= limits.max_model_len:
        return replace(limits, num_blocks=blocks)
    if fits == 0 or config.max_model_len is not None:
        need = _human(-(-limits.max_model_len // limits.block_size) * plan.block)
        raise ResourceError(
            f"a sequence of {limits.max_model_len} tokens needs a KV cache of {need} and there is {_human(memory)}",
            f"Set --max-model-len to at most {fits}, or raise --kv-cache-memory" if fits else "Raise --kv-cache-memory",
        )
    return replace(limits, num_blocks=blocks, max_model_len=fits)


def _block_bytes(cache: Tensor) -> int:
    return math.prod(pool_shape(cache)) * cache.dtype.itemsize


def activation_bytes(outline: Outline, tokens: int, sequences: int, vocabulary: int) -> int:
    """Peak of the intermediate values in the largest region, the values that wait for a later region, and the
    logits.
    """
    sizes = {
        "tokens": tokens,
        "logits": min(sequences, tokens),
        "sequences": sequences,
        "sequences_plus_1": sequences + 1,
    }
    peak = max((_region_peak(region.network, sizes) for region in outline.distinct.values()), default=0)
    crossing = max((sum(_size(t, sizes) for t in region.results) for region in outline.regions), default=0)
    return peak + 2 * crossing + 4 * vocabulary * sizes["logits"]


def _region_peak(network: Network, sizes: Mapping[str, int]) -> int:
    """Largest sum of values that are alive at once, as if no two layers were fused."""
    last = {tensor: i for i, layer in enumerate(network) for tensor in layer.inputs}
    alive: dict[Tensor, int] = {}
    peak = 0
    for i, layer in enumerate(network):
        alive.update((output, _size(output, sizes)) for output in layer.outputs)
        peak = max(peak, sum(alive.values()))
        for tensor in [t for t in alive if last.get(t, -1) <= i and not t.is_output]:
            del alive[tensor]
    return peak


def _size(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    count = tensor.dtype.itemsize
    for size in tensor.shape:
        try:
            count *= max(0, evaluate(size, sizes))
        except KeyError:  # a size of its own, such as the number of blocks: not of the activations
            return 0
    return count


def available_memory(device: str) -> int:
    """Bytes that this process may still take on the device."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterable[int]:
    for limit, used in _CGROUP_FILES:
        try:
            yield max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue


def _human(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


__all__ = ["MemoryPlan", "activation_bytes", "available_memory", "caches", "measured_plan", "plan_memory", "pool_shape"]
