"""What kernels and their plans depend on of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

H200_PROCESSORS = 132
H200_SHARED_MEMORY = 227 << 10


@dataclass(frozen=True)
class Gpu:
    """A GPU as `of` finds it, or any other to plan for."""

    processors: int
    """multiprocessors"""
    capability: tuple[int, int]
    """compute capability"""
    shared_memory: int = H200_SHARED_MEMORY
    """bytes that a program may have"""

    @property
    def overlaps(self) -> bool:
        """Launches may overlap (programmatic dependent launch), and tiles come by tensor descriptors (the tensor memory
        accelerator)."""
        return self.capability >= (9, 0)

    @property
    def is_hopper(self) -> bool:
        """There are the matrix units that kernels for Hopper are written for: four warps multiply 64 rows by
        descriptors of their tiles in shared memory (`wgmma`)."""
        return self.capability == (9, 0)

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """A CPU, where Triton interprets, has the sizes of an H200 and none of its features."""
        if device.type != "cuda":
            return cls(H200_PROCESSORS, (0, 0))
        found = torch.cuda.get_device_properties(device)
        memory = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(found.multi_processor_count, (found.major, found.minor), memory)


__all__ = ["H200_SHARED_MEMORY", "Gpu"]
