"""Weights on their way to a GPU: their places there are known at once, their values arrive while other work goes on.

Sizing the KV cache and capturing steps take as long as the copies, and need the weights' addresses alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch

COPYING_THREADS = 8
"""that read mapped weights and send them to the device: one alone is slower than either"""


class Transfer:
    """`with Transfer(weights, device) as moved: ...; moved.wait()`.

    Attributes:
        placed: the weights on the device, by name; those that are there already stay where they are. Until `wait` has
            returned, floating-point ones have any value.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Raises torch.OutOfMemoryError."""
        self.placed = {name: _place(value, device) for name, value in weights.items()}
        device = torch.empty(0, device=device).device  # with its number: threads begin on device 0
        self._pool = ThreadPoolExecutor(COPYING_THREADS, "weights", _use_own_stream, (device,))
        moving = [(self.placed[name], value) for name, value in weights.items() if self.placed[name] is not value]
        if device.type == "cuda":
            # Kernels that had the memory before may still write there: copies are in the order of other streams.
            torch.cuda.current_stream(device).synchronize()
        for target, value in moving:
            if not value.is_floating_point():  # places, it may be, that a step would look up outside of a table
                _copy(target, value)
        self._copies = [
            self._pool.submit(_copy, target, value) for target, value in moving if value.is_floating_point()
        ]

    def wait(self) -> None:
        """Raises what a copy raised."""
        for copy in self._copies:
            copy.result()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _place(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value if value.device.type == device.type else torch.empty_like(value, device=device)


def _use_own_stream(device: torch.device) -> None:
    """In the order of the default stream, copies and steps would wait for each other."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


@torch.no_grad()
def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)  # blocks until the values are there


__all__ = ["Transfer"]
