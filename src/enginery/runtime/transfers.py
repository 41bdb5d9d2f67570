"""Small arrays between the host and a device, none of which makes the host wait: what a step sends goes in one copy,
what comes back in one for each tensor.

Copies are asynchronous only from and to pinned memory. It comes from torch's caching host allocator, which hands a
block out again only when the copies that use it are done, so buffers may be dropped as soon as their copy is queued.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 8


Arrays = dict[str, np.ndarray]
Tensors = dict[str, Tensor]


def upload(sets: list[Arrays], device: torch.device) -> list[Tensors]:
    """All arrays on the device, valid in the order of its stream. On a CPU they share the arrays' memory."""
    arrays = [array for each in sets for array in each.values()]
    if device.type == "cpu" or not arrays:
        tensors = [torch.from_numpy(array) for array in arrays]
    else:
        tensors = unpack(pack(arrays, pinned=True).to(device, non_blocking=True), arrays)
    found = iter(tensors)
    return [dict(zip(each, found, strict=False)) for each in sets]


def pack(arrays: list[np.ndarray], *, pinned: bool) -> Tensor:
    """The bytes of all arrays in one host tensor."""
    buffer = torch.empty(sum(_padded(array.nbytes) for array in arrays), dtype=torch.uint8, pin_memory=pinned)
    view = buffer.numpy()
    start = 0
    for array in arrays:
        view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _padded(array.nbytes)
    return buffer


def unpack(buffer: Tensor, arrays: list[np.ndarray]) -> list[Tensor]:
    """Views of a buffer that `pack` laid out, of the arrays' shapes and types."""
    views = []
    start = 0
    for array in arrays:
        dtype = torch.from_numpy(array[:0]).dtype
        views.append(buffer[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _padded(array.nbytes)
    return views


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Download:
    """Tensors of one device on their way to the host."""

    def __init__(self, tensors: list[Tensor]) -> None:
        # From a GPU this gives pinned memory.
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cpu":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """Blocks until they are on the host."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]
