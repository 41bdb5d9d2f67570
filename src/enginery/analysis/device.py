"""What a device can do at most: bytes read and operations in a second, and where the numbers are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float
    """bytes of main memory read in a second"""
    flops: Mapping[torch.dtype, float]
    """FLOPs of dense matrix products in a second, by the dtype of their operands; float32 for all that is not named"""
    source: str = ""
    """of the numbers"""

    def seconds(self, flops: Mapping[torch.dtype, int], nbytes: int) -> float:
        """Time under the roofline: arithmetic and memory overlap perfectly."""
        return max(self.compute_seconds(flops), nbytes / self.bandwidth)

    def compute_seconds(self, flops: Mapping[torch.dtype, int]) -> float:
        return sum(count / self.flops.get(dtype, self.flops[torch.float32]) for dtype, count in flops.items())


_HOPPER = {torch.float32: 67e12, torch.float8_e4m3fn: 1979e12, torch.int8: 1979e12}

DEVICES: tuple[Device, ...] = (
    Device(
        "h200",
        4.27e12,
        MappingProxyType({**_HOPPER, torch.bfloat16: 790e12, torch.float16: 790e12}),
        "bandwidth and bfloat16 measured: a read-only reduction, cuBLAS; float16 as bfloat16; others datasheet",
    ),
    Device(
        "h100",
        3.35e12,
        MappingProxyType({**_HOPPER, torch.bfloat16: 989e12, torch.float16: 989e12}),
        "datasheet of the H100 SXM, dense",
    ),
    Device(
        "a100",
        2.039e12,
        MappingProxyType({torch.float32: 19.5e12, torch.bfloat16: 312e12, torch.float16: 312e12, torch.int8: 624e12}),
        "datasheet of the A100 SXM 80 GB, dense",
    ),
)
