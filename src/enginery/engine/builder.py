"""Building an engine: rewrite the network, cut it into regions, compile them while the weights are bound, write,
open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch

from enginery.engine.artifact import Artifact, ArtifactWriter, writing
from enginery.engine.binding import Read, Split, WeightEvaluator, split
from enginery.engine.code_cache import SIGNATURE, CodeCache, fingerprint
from enginery.engine.compile import Compilation
from enginery.engine.config import BLOCK_SIZE, BuildConfig
from enginery.engine.engine import Engine, Parts, Progress
from enginery.engine.manifest import Facts, Manifest, SourceFacts
from enginery.engine.memory import plan_memory
from enginery.engine.regions import outline
from enginery.engine.warming import warm
from enginery.engine.weights_file import plan_layout
from enginery.kernels.table import TABLE
from enginery.network import Network
from enginery.quantization.schemes import SCHEMES
from enginery.rewriting.pipeline import PipelineConfig, PipelineReport, run_phases
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.rules.quantise_linears import QuantiseLinears


class Source(Protocol):
    """An imported model."""

    @property
    def network(self) -> Network:
        """token_ids, positions -> logits; rewritten in place by the build"""
        ...

    @property
    def facts(self) -> SourceFacts: ...


def build(
    source: Source,
    read: Read,
    config: BuildConfig | None = None,
    directory: str | Path | None = None,
    *,
    carry: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Engine:
    """Builds an engine and opens it.

    Args:
        source: the imported network, which is rewritten in place, and the facts of its model.
        read: gives the checkpoint's tensors by the names of the network's constants.
        directory: where the engine appears when it is complete, in the place of a former one; None: it stays in memory.
        carry: files that belong to the engine, such as the tokenizer's.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an unknown rule, a length beyond the model's, a directory that holds something else.
        ResourceError: memory or disk is too small, or there is no compiler. A former engine stays as it was.
        BuildError: a weight or a region could not be computed or compiled; names it.
    """
    config = config or BuildConfig()
    report = progress or (lambda stage, done, total: None)
    device = config.resolved_device()
    report("rewrite", 0, 0)
    prepared = prepare(source, config)
    parts, manifest = prepared.parts, prepared.manifest
    regions = outline(parts.network)
    plan = plan_memory(parts.network, regions, manifest.facts, config, device)  # fails before the work does
    TABLE.load(device)
    cache = CodeCache(fingerprint(device))
    compilation = Compilation(cache, device, report)
    try:
        if directory is None:
            weights = dict(_bind(source, parts, read, report))
            return Engine(Parts(parts.network, manifest, weights, None), config, report)
        layout = plan_layout(parts.network.constants)
        with writing(Path(directory), layout.nbytes) as writer:
            if config.backend == "compiled":
                compilation.start(regions.distinct, partial(warm, regions, plan))
            writer.write_network(parts.network)
            writer.carry(carry)
            writer.write_weights(layout, _bind(source, parts, read, report))
            if config.backend == "compiled":
                _add_kernels(writer, cache, list(compilation.wait().values()))
            manifest = writer.finish(manifest)
    finally:
        compilation.close()
    return Engine.open(Artifact(Path(directory), manifest, parts.network), config, report)


@dataclass(frozen=True)
class Prepared:
    """An imported model behind all phases, before any weight is read."""

    parts: Split
    manifest: Manifest
    phases: PipelineReport


def prepare(source: Source, config: BuildConfig) -> Prepared:
    """Rewrites the network in place and separates what is computed once from what runs in every step."""
    device = config.resolved_device()
    phases = run_phases(source.network, pipeline_config(config))
    parts = split(source.network)
    parts.network.verify()
    return Prepared(parts, _manifest(Facts.of(source.facts), config, device, phases), phases)


def pipeline_config(config: BuildConfig) -> PipelineConfig:
    """What the phases need to know of a build."""
    return PipelineConfig(
        disabled_rules=config.disabled_rules,
        rules=(*config.rules, *quantising_rules(config)),
        device=config.resolved_device(),
        block_size=BLOCK_SIZE,
    )


def quantising_rules(config: BuildConfig) -> tuple[PatternRewriter, ...]:
    """Those of the scheme, if there is one; none if the caller gave such a rule."""
    if config.quantization is None or any(isinstance(rule, QuantiseLinears) for rule in config.rules):
        return ()
    return (QuantiseLinears(per_channel=SCHEMES[config.quantization].per_channel),)


def _bind(source: Source, parts: Split, read: Read, report: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    evaluator = WeightEvaluator(source.network, parts.weights.values(), read)
    total = len(parts.weights)
    for done, (name, tensor) in enumerate(parts.weights.items()):
        report("bind", done, total)
        yield name, evaluator.value(tensor)
    report("bind", total, total)


def _add_kernels(writer: ArtifactWriter, cache: CodeCache, packages: Sequence[Path]) -> None:
    with cache.scratch() as scratch:
        signature = Path(scratch) / SIGNATURE
        signature.write_bytes(cache.sign(packages))
        writer.add_kernels(cache.fingerprint, [*packages, signature])


def _manifest(facts: Facts, config: BuildConfig, device: str, phases: PipelineReport) -> Manifest:
    counts = [
        {"phase": name, "rules": {label: rule.rewritten for label, rule in report.rules.items() if rule.rewritten}}
        for name, report in phases.phases
    ]
    versions = {"enginery": metadata.version("enginery"), "torch": torch.__version__}
    return Manifest(facts, config.cache_key(), device, tuple(counts), versions)


__all__ = ["Prepared", "Source", "build", "pipeline_config", "prepare"]
