"""What a layer costs in one step: floating-point operations, and bytes by what they are."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Cost:
    """FLOPs (a multiply-add is two) and bytes moved to and from memory."""

    flops: int = 0
    weights: int = 0
    """bytes of constants read"""
    reads: int = 0
    """bytes of activations and of the batch's tables read"""
    writes: int = 0
    """bytes of activations written"""
    kv_reads: int = 0
    """bytes of the KV pools read"""
    kv_writes: int = 0
    """bytes of the KV pools written"""

    @property
    def bytes(self) -> int:
        return self.weights + self.activations + self.kv

    @property
    def activations(self) -> int:
        return self.reads + self.writes

    @property
    def kv(self) -> int:
        return self.kv_reads + self.kv_writes

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))

    def __mul__(self, count: int) -> Cost:
        return Cost(*(getattr(self, name) * count for name in _FIELDS))


_FIELDS = tuple(field.name for field in fields(Cost))
