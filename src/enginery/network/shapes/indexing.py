"""Shape rules of gathers, scatters and lookups."""

from __future__ import annotations

from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.shapes.elementwise import same
from enginery.network.shapes.sizes import Shape, Types, axis, broadcast_all, differ, product, replaced, show, table
from enginery.network.tensor import Tensor


def embedding(weight: Tensor, indices: Tensor, *rest: Any) -> Types:
    if len(weight.shape) != 2:
        raise NetworkError(f"an embedding has two dimensions, not {show(weight.shape)}")
    return (((*indices.shape, weight.shape[1]), weight.dtype),)


def index_select(self: Tensor, dim: int, index: Tensor) -> Types:
    count = product(index.shape)
    shape = replaced(self.shape, axis(dim, len(self.shape)), count) if self.shape else ()
    return ((shape, self.dtype),)


def gather(self: Tensor, dim: int, index: Tensor, *rest: Any) -> Types:
    return ((index.shape, self.dtype),)


def index(self: Tensor, indices: tuple) -> Types:
    """Advanced indexing: the indices broadcast together; the result stands at the first if they are neighbours."""
    rank = len(self.shape)
    if any(entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in indices):
        raise NetworkError("indexing by a mask gives a size that depends on data")
    places = [i for i, entry in enumerate(indices) if entry is not None]
    if len(indices) > rank:
        raise NetworkError(f"{len(indices)} indices for {rank} dimensions")
    if not places:
        return ((self.shape, self.dtype),)
    together = broadcast_all([indices[i].shape for i in places])
    kept: list[Shape] = [(size,) for size in self.shape]
    for i in places:
        kept[i] = ()
    adjacent = places[-1] - places[0] + 1 == len(places)
    if adjacent:
        kept[places[0]] = together
        return ((sum(kept, ()), self.dtype),)
    return ((together + sum(kept, ()), self.dtype),)


def take_along_dim(self: Tensor, indices: Tensor, dim: int | None) -> Types:
    if dim is None:
        return (((product(indices.shape),), self.dtype),)
    place = axis(dim, len(self.shape))
    shape = broadcast_all([replaced(self.shape, place, 1), replaced(indices.shape, place, 1)])
    return ((replaced(shape, place, indices.shape[place]), self.dtype),)


def one_hot(self: Tensor, classes: int) -> Types:
    if classes == -1:
        raise NetworkError("one_hot without a number of classes gives a size that depends on data")
    return (((*self.shape, classes), torch.int64),)


def index_put(self: Tensor, indices: tuple, values: Tensor, *rest: Any) -> Types:
    if self.dtype != values.dtype:
        raise NetworkError(f"values of {values.dtype} are put in a tensor of {self.dtype}")
    return ((self.shape, self.dtype),)


def copy(self: Tensor, source: Tensor, *rest: Any) -> Types:
    extra = len(self.shape) - len(source.shape)
    if extra < 0 or any(size != 1 and differ(size, self.shape[i]) for i, size in enumerate(source.shape, extra)):
        raise NetworkError(f"{show(source.shape)} cannot be copied into {show(self.shape)}")
    return ((self.shape, self.dtype),)


RULES = table(
    {
        "embedding": embedding,
        "index_select": index_select,
        "gather": gather,
        "index.Tensor": index,
        "take_along_dim": take_along_dim,
        "one_hot": one_hot,
        "index_put": index_put,
        "copy": copy,
        "scatter.src scatter.value scatter_add scatter_reduce.two index_add index_copy index_fill.int_Scalar "
        "slice_scatter select_scatter masked_scatter": same,
    }
)
