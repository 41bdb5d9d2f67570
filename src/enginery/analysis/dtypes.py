"""In which dtypes a network computes: casts, layers wider than its weights and why, casts that undo each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from enginery.analysis.layer_cost import known_values
from enginery.analysis.profile import without_numbers
from enginery.analysis.text import columns
from enginery.network.kind import LayerKind
from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.rewriting.analysis import AnalysisPatternManager, PatternAnalyzer
from enginery.rewriting.traits import TRANSPARENT


@dataclass(frozen=True)
class Cast:
    """A conversion between floating-point dtypes in every step."""

    path: str
    source: torch.dtype
    target: torch.dtype

    @property
    def is_up(self) -> bool:
        return _is_wider(self.target, self.source)


@dataclass(frozen=True)
class RoundTrip:
    """A cast of a cast back to the dtype before both, perhaps through views."""

    path: str
    dtype: torch.dtype
    through: torch.dtype

    @property
    def is_exact(self) -> bool:
        """Both casts may be dropped; otherwise values are rounded to the dtype in between."""
        return _is_wider(self.through, self.dtype)


@dataclass(frozen=True)
class Wide:
    """Layers of a module that compute in a wider dtype than the network's weights have."""

    path: str
    dtype: torch.dtype
    because: frozenset[str]
    """where the wider values began"""
    layers: int = 1


class CastAnalyzer(PatternAnalyzer):
    root_layer = (LayerKind.CAST,)

    def analyze(self, root: Layer) -> Cast | None:
        source, target = root.inputs[0].dtype, root.output.dtype
        is_float = source.is_floating_point and target.is_floating_point and source != target
        return Cast(without_numbers(root.module_path), source, target) if is_float else None


class RoundTripAnalyzer(PatternAnalyzer):
    root_layer = (LayerKind.CAST,)

    def analyze(self, root: Layer) -> RoundTrip | None:
        inner = root.inputs[0].parent
        while inner is not None and inner.kind is not LayerKind.CAST and inner.op._schema.name in TRANSPARENT:
            inner = inner.inputs[0].parent
        if inner is None or inner.kind is not LayerKind.CAST:
            return None
        before, between, after = inner.inputs[0].dtype, inner.output.dtype, root.output.dtype
        is_trip = before == after != between and before.is_floating_point and between.is_floating_point
        return RoundTrip(without_numbers(root.module_path), after, between) if is_trip else None


class WideAnalyzer(PatternAnalyzer):
    """Layers wider than `dtype`, each with where the wider values began: casts, constants, an op's own choice."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._origins: dict[Tensor, frozenset[str]] = {}

    def analyze(self, root: Layer) -> Wide | None:
        wide = [output for output in root.outputs if _is_wider(output.dtype, self.dtype)]
        if not wide:
            return None
        because = self._because(root)
        self._origins.update(dict.fromkeys(wide, because))
        is_view = root.kind in (LayerKind.SHUFFLE, LayerKind.SLICE)
        return None if is_view else Wide(without_numbers(root.module_path), wide[0].dtype, because)

    def _because(self, layer: Layer) -> frozenset[str]:
        if layer.kind is LayerKind.CAST:
            return frozenset({f"cast in {without_numbers(layer.module_path) or 'the network'}"})
        sources = [tensor for tensor in layer.inputs if _is_wider(tensor.dtype, self.dtype)]
        if not sources:
            return frozenset({f"{layer.op._opname} gives it in {without_numbers(layer.module_path) or 'the network'}"})
        return frozenset().union(*(self._origin(tensor) for tensor in sources))

    def _origin(self, tensor: Tensor) -> frozenset[str]:
        name = f"{without_numbers(tensor.name)} is {_name(tensor.dtype)}"
        return self._origins.get(tensor, frozenset({name}))


@dataclass(frozen=True)
class DtypeAudit:
    """`str(audit)` is a table of what is wider than the weights, and the casts around it."""

    dtype: torch.dtype
    """of most weights, 8-bit ones apart"""
    casts: Counter[Cast]
    wide: tuple[Wide, ...]
    round_trips: Counter[RoundTrip]

    def to_json(self) -> dict[str, Any]:
        wide = [
            {"layer": fact.path, "dtype": _name(fact.dtype), "because": sorted(fact.because), "layers": fact.layers}
            for fact in self.wide
        ]
        casts = [
            {"layer": fact.path, "from": _name(fact.source), "to": _name(fact.target), "count": count}
            for fact, count in self.casts.items()
        ]
        trips = [
            {"layer": fact.path, "dtype": _name(fact.dtype), "through": _name(fact.through), "exact": fact.is_exact,
             "count": count}
            for fact, count in self.round_trips.items()
        ]  # fmt: skip
        return {"dtype": _name(self.dtype), "wide": wide, "casts": casts, "round_trips": trips}

    def __str__(self) -> str:
        up = sum(count for cast, count in self.casts.items() if cast.is_up)
        lines = [
            f"weights are {_name(self.dtype)}; {up} casts to wider dtypes and {self.casts.total() - up} to narrower"
        ]
        if self.wide:
            rows = [(fact.path or ".", _name(fact.dtype), _reasons(fact), str(fact.layers)) for fact in self.wide]
            lines += columns(("computes wider", "in", "because", "layers"), rows, left=3)
        for trip, count in self.round_trips.items():
            what = (
                "casts that cancel" if trip.is_exact else f"values rounded to {_name(trip.through)} and widened again"
            )
            lines.append(f"{trip.path or '.'}: {count} × {what}")
        return "\n".join(lines)


def audit_dtypes(network: Network, weights: Iterable[Tensor] = ()) -> DtypeAudit:
    """`weights`: inputs that hold weights, beside the constants. What is computed once does not count."""
    known = known_values(network, weights)
    dtype = _main_dtype(known)
    analyzers = {"casts": CastAnalyzer(), "wide": WideAnalyzer(dtype), "round trips": RoundTripAnalyzer()}
    manager = AnalysisPatternManager()
    for label, analyzer in analyzers.items():
        manager.add(label, analyzer)
    found = manager.analyze(network)
    live = {layer.name for layer in network if not known.issuperset(layer.outputs)}
    casts, wide, trips = ([fact for name, fact in found.facts[label] if name in live] for label in analyzers)
    return DtypeAudit(dtype, Counter(casts), _by_module(wide), Counter(trips))


def _by_module(facts: Iterable[Wide]) -> tuple[Wide, ...]:
    merged: dict[tuple[str, torch.dtype], Wide] = {}
    for fact in facts:
        former = merged.get((fact.path, fact.dtype), replace(fact, layers=0))
        because = former.because | fact.because
        merged[fact.path, fact.dtype] = replace(fact, because=because, layers=former.layers + fact.layers)
    return tuple(merged.values())


def _main_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Of most elements among the named weights, but for 8-bit ones, in which nothing flows; float32 without any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.parent is None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            size = tensor.numel()
            counts[tensor.dtype] += size if isinstance(size, int) else 0
    return counts.most_common(1)[0][0] if counts else torch.float32


def _is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > other.itemsize


def _reasons(fact: Wide) -> str:
    own = f"cast in {fact.path or 'the network'}"
    return ", ".join("it casts its input" if reason == own else reason for reason in sorted(fact.because))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
