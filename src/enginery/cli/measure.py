"""Times the regions of a built engine, one after another, on a batch of a given shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from enginery.analysis import Step
    from enginery.engine.artifact import Artifact
    from enginery.engine.compile import Run
    from enginery.engine.regions import Outline
    from enginery.network import Tensor

WARM_UP = 3
REPEATS = 10


@dataclass
class RegionTimer:
    """Runs the compiled regions of an engine as its steps do, but waits for the device behind each."""

    regions: Outline
    runs: Mapping[str, Run]
    """by key of the region"""
    values: dict[Tensor, torch.Tensor]
    """weights, KV pools and the batch"""
    synchronize: Callable[[], object]

    def measure(self) -> dict[str, float]:
        """Seconds of one run of each distinct region, by its name: the median over its repetitions and steps."""
        names = {key: region.name for key, region in self.regions.distinct.items()}
        times: dict[str, list[float]] = {name: [] for name in names.values()}
        for repeat in range(WARM_UP + REPEATS):
            for region, seconds in zip(self.regions.regions, self._step(), strict=True):
                if repeat >= WARM_UP:
                    times[names[region.key]].append(seconds)
        return {name: statistics.median(found) for name, found in times.items()}

    def _step(self) -> list[float]:
        """Seconds of each region. Activations are freed behind their last reader, as in an engine."""
        last = {tensor: i for i, region in enumerate(self.regions.regions) for tensor in region.bindings}
        values = dict(self.values)
        times = []
        for i, region in enumerate(self.regions.regions):
            arguments = [values[tensor] for tensor in region.bindings]
            begin = time.perf_counter()
            results = self.runs[region.key](arguments)
            self.synchronize()
            times.append(time.perf_counter() - begin)
            values.update(zip(region.results, results, strict=True))
            for tensor in region.bindings:
                if last[tensor] == i:
                    del values[tensor]
        return times


def region_timer(artifact: Artifact, step: Step, seed: int = 0) -> RegionTimer:
    """For an engine on disk. Regions that are not in the user's cache are compiled into it."""
    import torch

    from enginery.engine.compile import load
    from enginery.engine.engine import compile_regions
    from enginery.engine.memory import caches
    from enginery.engine.regions import outline

    network, device = artifact.network, artifact.manifest.device
    regions = outline(network)
    runs = {key: load(path, device) for key, path in compile_regions(regions, device).items()}
    generator = torch.Generator().manual_seed(seed)
    given = {**artifact.weights(), **batch(step, artifact.manifest.facts.vocab_size, generator)}
    tensors = [tensor for tensor in (*network.inputs, *network.constants) if tensor.name in given]
    values = {tensor: given[tensor.name].to(device) for tensor in tensors}
    values.update(kv_pools(caches(network), step, device, generator))
    return RegionTimer(regions, runs, values, torch.cuda.synchronize if device == "cuda" else lambda: None)


def kv_pools(
    pools: Sequence[Tensor], step: Step, device: str, generator: torch.Generator
) -> dict[Tensor, torch.Tensor]:
    """As large as the step needs, and filled: pages that nobody wrote would all be one page of zeros in the cache."""
    import torch

    from enginery.engine.memory import pool_shape

    found: dict[Tensor, torch.Tensor] = {}
    for pool in pools:
        block = torch.randn(pool_shape(pool), generator=generator).to(pool.dtype)
        found[pool] = block.to(device).expand(step.symbols["num_blocks"], *block.shape).contiguous()
    return found


def batch(step: Step, vocabulary: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The inputs of a step by name: random tokens, blocks in random order."""
    import torch

    counts = torch.tensor([each for sequences, each in step.queries() for _ in range(sequences)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    owner = torch.repeat_interleave(torch.arange(step.sequences), counts)
    positions = step.context + torch.arange(step.tokens) - starts[owner]
    tables = torch.randperm(step.symbols["num_blocks"], generator=generator).view(step.sequences, -1)
    slots = tables[owner, positions // step.block_size] * step.block_size + positions % step.block_size
    return {
        "token_ids": torch.randint(vocabulary, (step.tokens,), generator=generator),
        "positions": positions,
        "slot_mapping": slots,
        "block_tables": tables.int(),
        "query_start": starts.int(),
        "seq_lens": (step.context + counts).int(),
        "logits_indices": starts[1:] - 1,
    }
