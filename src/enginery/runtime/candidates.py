"""The most likely tokens of each row of logits, in one order everywhere: by value, equal ones by token id."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Tokens per block of the vocabulary; a block is summed up by its largest logit or its mass."""

_LOW_WORD = 2**32 - 1


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `[M, V]`, largest first, and their columns. Does not wait for a device."""
    return candidates_on_host(logits, count) if logits.device.type == "cpu" else candidates_on_device(logits, count)


def candidates_on_device(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top_candidates` without looking at the values.

    The k largest elements lie in the k blocks of largest maximum, so two small selections replace a large one.
    """
    num_rows, size = logits.shape
    num_blocks = size // BLOCK
    if count * 2 >= num_blocks:
        return _largest(logits, count)
    whole = num_blocks * BLOCK
    blocks = logits[:, :whole].unflatten(1, (num_blocks, BLOCK))
    chosen = torch.topk(blocks.amax(dim=2), count, dim=1, sorted=False).indices.sort(dim=1).values
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if whole < size:
        tail = torch.arange(whole, size, device=logits.device).expand(num_rows, -1)
        columns = torch.cat([columns, tail], dim=1)
    values, places = _largest(logits.gather(1, columns), count)
    return values, columns.gather(1, places)


def _largest(elements: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` with equal elements in order of their places, whose own order is anyone's guess."""
    if count == elements.shape[1]:
        return elements.sort(dim=1, descending=True, stable=True)
    found = torch.topk(elements, count, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = elements.gather(1, found).sort(dim=1, descending=True, stable=True)
    return values, found.gather(1, order)


def candidates_on_host(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`top_candidates` where looking is free: the few elements that reach a lower bound are sorted as whole numbers of
    their value and column, for which numpy has vector code."""
    array = logits.numpy()
    num_rows, size = array.shape
    rows, columns = np.divmod(np.flatnonzero(array >= _lower_bound(logits, count)), size)
    counts = np.bincount(rows, minlength=num_rows)
    width = int(counts.max(initial=count))
    keys = np.full((num_rows, width), np.iinfo(np.int64).min)
    keys[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = _keys(array[rows, columns], columns)
    if width > 4 * count:
        keys = np.partition(keys, width - count, axis=1)
    keys.sort(axis=1)
    # A row that holds NaN may have less than it takes; its columns mean nothing, but must be some.
    found = np.minimum(_LOW_WORD - (keys[:, : -count - 1 : -1] & _LOW_WORD), size - 1)
    return torch.from_numpy(np.take_along_axis(array, found, axis=1)), torch.from_numpy(found)


def _lower_bound(logits: Tensor, count: int) -> np.ndarray:
    """`[M, 1]`, not above the element of rank `count`."""
    size = logits.shape[1]
    num_blocks = size // BLOCK
    if count * 2 >= num_blocks:
        return np.partition(logits.numpy(), size - count, axis=1)[:, size - count, None]
    largest = logits[:, : num_blocks * BLOCK].unflatten(1, (num_blocks, BLOCK)).amax(dim=2).numpy()
    return np.partition(largest, num_blocks - count, axis=1)[:, num_blocks - count, None]


def _keys(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Whole numbers ordered by value, then by falling column."""
    bits = values.view(np.int32)
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # a negative float's bits count the wrong way
    return (ordered.astype(np.int64) << 32) + (_LOW_WORD - columns)
