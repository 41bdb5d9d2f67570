"""Small arrays between the host and a device, all of a step in one copy each way, none of which makes the host wait.

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
        self._tensors = tensors
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cpu":
            packed = join(tensors)
            self._buffer = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._buffer.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[np.ndarray]:
        """Blocks until they are on the host."""
        if self._event is None:
            return [tensor.numpy() for tensor in self._tensors]
        self._event.synchronize()
        return split(self._buffer, self._tensors)


def join(tensors: list[Tensor]) -> Tensor:
    """The bytes of all tensors, on their device."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def split(buffer: Tensor, tensors: list[Tensor]) -> list[np.ndarray]:
    """Views of a buffer on the host that `join` filled, of the tensors' shapes and types."""
    dtypes = [torch.empty(0, dtype=tensor.dtype).numpy().dtype for tensor in tensors]
    parts = buffer.split([tensor.nbytes for tensor in tensors])
    return [
        part.numpy().view(dtype).reshape(tensor.shape)
        for part, dtype, tensor in zip(parts, dtypes, tensors, strict=True)
    ]
