"""Where the device's time goes: the kernels of a few steps, from torch.profiler, grouped by what they are for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norm, pointwise", re.compile(r"^triton_(poi|per|red)_|layer_?norm|rms_?norm|silu|rotary|rope|add_norm", re.I)),
    ("norm, pointwise", re.compile(r"^(add_and_normalise|gate|quantise|apply_scales)$")),
    ("copies", re.compile(r"^memcpy|^memset|copy_kernel|direct_copy|CatArray|copy_", re.I)),
    ("attention", re.compile(r"attend|attention|flash|fmha|merge_splits|write_cache|sdpa|paged", re.I)),
    ("sampling", re.compile(r"argmax|arg_max|topk|top_k|softmax|sort|scan|multinomial|sampl|random|exponential", re.I)),
    ("linear", re.compile(r"gemm|gemv|nvjet|cutlass|cublas|linear|matmul|_mm|splitk|^triton_(mm|tem)_|bmm", re.I)),
    ("norm, pointwise", re.compile(r"elementwise|reduce_kernel|pointwise|index|embedding|gather|quant|aten::", re.I)),
)
"""The first that fits the name counts."""
OTHER = "other"
LISTED = 40
"""kernels that a record names; the rest is in the groups"""
LISTED_GAPS = 12
STEP_BEGIN = "Memcpy HtoD"
"""what a step does first: its inputs go to the device"""


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if pattern.search(name)), OTHER)


@dataclass
class Kernel:
    name: str
    count: float = 0.0
    """calls of one step"""
    us: float = 0.0
    """of all of them"""


@dataclass
class Gap:
    """In which nothing runs, between the end of one kernel and the beginning of another."""

    before: str
    after: str
    count: float = 0.0
    """in one step"""
    us: float = 0.0
    """of all of them"""


@dataclass
class Profile:
    """Of one step, in microseconds."""

    kernels: list[Kernel] = field(default_factory=list)
    """longest first"""
    busy_us: float = 0.0
    """in which at least one kernel ran"""
    gaps: list[Gap] = field(default_factory=list)
    """within steps, by the kernels around them, largest sum first"""
    borders: list[float] = field(default_factory=list)
    """each gap between two steps"""

    def to_json(self, step_us: float) -> dict[str, Any]:
        """`step_us` is a step's time without the profiler; what it has beyond the kernels are gaps."""
        groups: dict[str, dict[str, float]] = {}
        for kernel in self.kernels:
            entry = groups.setdefault(group_of(kernel.name), {"count": 0.0, "us": 0.0})
            entry["count"] += kernel.count
            entry["us"] += kernel.us
        groups["gaps"] = {"count": 0.0, "us": max(0.0, step_us - self.busy_us)}
        for entry in groups.values():
            entry["share"] = entry["us"] / step_us
        listed = [
            {"name": k.name[:160], "group": group_of(k.name), "count": k.count, "us": k.us, "share": k.us / step_us}
            for k in self.kernels[:LISTED]
        ]
        return {"busy, us": self.busy_us, "groups": groups, "kernels": listed, "idle": self._idle()}

    def _idle(self) -> dict[str, Any]:
        """What the profiler saw; it adds time of its own, so the sum may be more than the gaps of `to_json`."""
        largest = [
            {"before": gap.before[:160], "after": gap.after[:160], "count": gap.count, "us": gap.us}
            for gap in self.gaps[:LISTED_GAPS]
        ]
        borders = {"count": len(self.borders), "us each": sum(self.borders) / max(1, len(self.borders))}
        count, us = sum(gap.count for gap in self.gaps), sum(gap.us for gap in self.gaps)
        return {"count": count, "us": us, "borders": borders, "largest": largest}


def profiled(run: Callable[[], object], steps: int, device: str) -> Profile:
    """What `run`, which does `steps` steps, has on the device. On a CPU: the operators' own times."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in recorded.events() if event.device_type == wanted and not event.is_user_annotation]
    spans = []
    for event in events:
        begin = event.time_range.start
        spans.append((event.name, begin, event.time_range.end if cuda else begin + event.self_cpu_time_total))
    return summarize(spans, steps)


def summarize(spans: Iterable[tuple[str, float, float]], steps: int) -> Profile:
    """From (kernel, begin, end) of `steps` steps to one step."""
    spans = sorted(spans, key=lambda span: span[1])
    kernels: dict[str, Kernel] = {}
    gaps: dict[tuple[str, str], Gap] = {}
    borders: list[float] = []
    busy, reached, last = 0.0, float("-inf"), ""
    for name, begin, end in spans:
        kernel = kernels.setdefault(name, Kernel(name))
        kernel.count += 1 / steps
        kernel.us += (end - begin) / steps
        if last and begin > reached:
            if name.startswith(STEP_BEGIN):
                borders.append(begin - reached)
            else:
                gap = gaps.setdefault((last, name), Gap(last, name))
                gap.count += 1 / steps
                gap.us += (begin - reached) / steps
        busy += max(0.0, end - max(begin, reached))
        if end > reached:
            reached, last = end, name
    return Profile(
        sorted(kernels.values(), key=lambda kernel: -kernel.us),
        busy / steps,
        sorted(gaps.values(), key=lambda gap: -gap.us),
        borders,
    )
