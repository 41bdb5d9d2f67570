"""A network's work in one step beside what a device can do: FLOPs, bytes, intensity and time under the roofline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from enginery.analysis.cost import Cost
from enginery.analysis.device import Device
from enginery.analysis.fusion import Chain, fuse
from enginery.analysis.layer_cost import CostAnalyzer
from enginery.analysis.step import Step
from enginery.analysis.text import columns, si
from enginery.network.network import Network
from enginery.network.operator import operator_name, signature
from enginery.network.tensor import Tensor

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Part:
    """A piece of a larger network, such as an engine's region, that is run `count` times in a step."""

    name: str = ""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name} × {self.count}" if self.count > 1 else self.name


WHOLE = Part()


@dataclass(frozen=True)
class Row:
    """A kernel that runs `count` times: one layer, or a chain that can be fused. Costs are those of one run."""

    part: Part
    path: str
    """of its module, with `*` for the numbers of repeated ones"""
    ops: tuple[str, ...]
    count: int
    cost: Cost
    apart: Cost
    """one layer after the other, nothing fused"""
    seconds: float
    """under the roofline"""
    bound: str
    """memory or compute"""

    @property
    def total(self) -> Cost:
        return self.cost * self.count

    @property
    def saved(self) -> int:
        """Bytes that fusing its layers saves, over all runs."""
        return (self.apart.bytes - self.cost.bytes) * self.count

    def to_json(self) -> dict[str, Any]:
        costs = {"cost": _cost_json(self.cost), "unfused_bytes": self.apart.bytes, "saved_bytes": self.saved}
        times = {"roofline_seconds": self.seconds, "bound": self.bound}
        return {"part": self.part.name, "layer": self.path, "ops": self.ops, "count": self.count, **costs, **times}


@dataclass(frozen=True)
class Profile:
    """All kernels of a step. `str(profile)` is a table; profiles of parts are joined by `join`."""

    step: Step
    device: Device
    rows: tuple[Row, ...]
    folded: Cost
    """of layers that are computed once, when weights are bound; in no total"""
    unknown: tuple[tuple[str, int], ...]
    """operators without a rule for FLOPs, and the number of their layers: their bytes are counted, nothing else"""

    @cached_property
    def cost(self) -> Cost:
        return sum((row.total for row in self.rows), Cost())

    @cached_property
    def apart(self) -> Cost:
        return sum((row.apart * row.count for row in self.rows), Cost())

    @cached_property
    def seconds(self) -> float:
        """Under the roofline, one kernel after the other."""
        return sum(row.seconds * row.count for row in self.rows)

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        memory = sum(row.seconds * row.count for row in self.rows if row.bound == "memory")
        return "memory" if memory >= self.seconds / 2 else "compute"

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens / self.seconds if self.seconds else 0.0

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(dict.fromkeys(row.part for row in self.rows))

    def of_part(self, part: Part) -> Profile:
        """Of all runs of one part."""
        return replace(self, rows=tuple(row for row in self.rows if row.part == part))

    def to_json(self) -> dict[str, Any]:
        device = {
            "name": self.device.name,
            "bandwidth": self.device.bandwidth,
            "flops": {str(dtype).removeprefix("torch."): value for dtype, value in self.device.flops.items()},
            "source": self.device.source,
        }
        step = {"tokens": self.step.tokens, "sequences": self.step.sequences, "context": self.step.context}
        total = {
            **_cost_json(self.cost),
            "unfused_bytes": self.apart.bytes,
            "bound": self.bound,
            "roofline_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        rows = [row.to_json() for row in self.rows]
        rest = {"once": _cost_json(self.folded), "without_flops": dict(self.unknown)}
        return {"step": step, "device": device, "total": total, "rows": rows, **rest}

    def __str__(self) -> str:
        lines = columns(_COLUMNS, list(self._cells()), gaps=len(self.parts) > 1)
        return "\n".join([f"{self.step}, on {self.device.name}", *lines, "", *self._totals()])

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for part in self.parts:
            rows = [row for row in self.rows if row.part == part]
            if part.name:
                yield (str(part), *[""] * (len(_COLUMNS) - 1))
            yield from (self._cell(row, indent="  " if part.name else "") for row in rows)

    def _cell(self, row: Row, indent: str) -> tuple[str, ...]:
        cost = row.total
        share = 100 * row.seconds * row.count / self.seconds if self.seconds else 0.0
        return (
            f"{indent}{row.path or '.'}", _short(row.ops), str(row.count), si(cost.flops),
            si(cost.weights, "B"), si(cost.activations, "B"), si(cost.kv, "B"), f"{cost.intensity:.2f}", row.bound,
            si(row.seconds * row.count, "s"), f"{share:.1f}", si(row.saved, "B") if row.saved else "",
        )  # fmt: skip

    def _totals(self) -> Iterable[str]:
        cost = self.cost
        yield f"FLOPs      {si(cost.flops)}"
        parts = {"weights": cost.weights, "activations": cost.activations, "KV cache": cost.kv}
        each = ", ".join(f"{name} {si(count, 'B')}" for name, count in parts.items())
        yield f"bytes      {si(cost.bytes, 'B')}: {each}; {si(self.apart.bytes, 'B')} if nothing is fused"
        yield f"intensity  {cost.intensity:.2f} FLOPs per byte, bound by {self.bound}"
        yield f"roofline   {si(self.seconds, 's')}, {self.tokens_per_second:,.0f} tokens/s"
        yield f"device     {_describe(self.device)}"
        if self.folded.bytes:
            yield f"once       {si(self.folded.bytes, 'B')} more, when weights are bound"
        if self.unknown:
            yield f"no FLOPs   {', '.join(f'{name} × {count}' for name, count in self.unknown)}: only bytes are counted"


_COLUMNS = (
    "layer", "ops", "×", "FLOPs", "weights", "activations", "KV", "FLOP/B", "bound by", "roofline", "%", "saved",
)  # fmt: skip


def profile(
    network: Network, step: Step, device: Device, *, weights: Iterable[Tensor] = (), part: Part = WHOLE
) -> Profile:
    """What a step of the network costs on a device.

    `weights` and `part` are for pieces of a larger network: its inputs that hold weights, and what to call it. Raises
    UsageError where a symbolic size has no value.
    """
    analyzer = CostAnalyzer(network, step, weights)
    costs = analyzer.run()
    chains = fuse(network, costs, analyzer.layout, analyzer.known)
    unknown = Counter(operator_name(each.layer.op) for each in costs if not each.has_rule and not each.is_folded)
    folded = sum((each.cost for each in costs if each.is_folded), Cost())
    return Profile(
        step, device, _grouped([_row(chain, device, part) for chain in chains]), folded,
        tuple((name, number * part.count) for name, number in unknown.items()),
    )  # fmt: skip


def join(profiles: Sequence[Profile]) -> Profile:
    """One profile of parts that are run one after the other. All are of the same step and device; at least one."""
    unknown: Counter[str] = Counter()
    for each in profiles:
        unknown.update(dict(each.unknown))
    rows = tuple(row for each in profiles for row in each.rows)
    folded = sum((each.folded for each in profiles), Cost())
    return replace(profiles[0], rows=rows, folded=folded, unknown=tuple(unknown.items()))


def without_numbers(path: str) -> str:
    """`model.layers.3.mlp` -> `model.layers.*.mlp`"""
    return _NUMBER.sub("*", path)


def _row(chain: Chain, device: Device, part: Part) -> Row:
    seconds = device.seconds(chain.flops, chain.cost.bytes)
    is_compute = device.compute_seconds(chain.flops) * device.bandwidth > chain.cost.bytes
    ops = tuple(signature(each.layer.op).short_name for each in chain.layers)
    bound = "compute" if is_compute else "memory"
    return Row(part, without_numbers(chain.path), ops, part.count, chain.cost, chain.apart, seconds, bound)


def _grouped(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Equal rows as one with their counts, in the order of the first."""
    counts: Counter[Row] = Counter()
    for row in rows:
        counts[replace(row, count=0)] += row.count
    return tuple(replace(row, count=count) for row, count in counts.items())


def _short(ops: Sequence[str]) -> str:
    """Each name once, and the number of layers."""
    names = list(dict.fromkeys(ops))
    text = " ".join(names[:4]) + (" …" if len(names) > 4 else "")
    return f"{text} ({len(ops)})" if len(ops) > 1 else text


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {**asdict(cost), "bytes": cost.bytes, "intensity": cost.intensity}


def _describe(device: Device) -> str:
    speeds = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {si(value, 'FLOP/s')}" for dtype, value in device.flops.items()
    )
    return f"{device.name}: {si(device.bandwidth, 'B/s')}, {speeds} ({device.source})"
