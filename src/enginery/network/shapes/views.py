"""Shape rules of views, reshapes, splits and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size
from enginery.network.shapes.promotion import result_type_of
from enginery.network.shapes.sizes import (
    Shape,
    Types,
    at_most,
    axis,
    broadcast,
    ceil_div,
    differ,
    minimum,
    product,
    replaced,
    require_equal,
    show,
    table,
)
from enginery.network.tensor import Tensor

_END = torch.iinfo(torch.int64).max
_MAX_PARTS = 1 << 16
"""outputs of one call: a network from a file may ask for any number"""


def view(self: Tensor, size: tuple) -> Types:
    shape = self.shape
    if size == shape:
        return ((size, self.dtype),)
    same = 0  # leading sizes that stay: what remains is mostly plain numbers, where products are cheap
    for old, new in zip(shape, size, strict=False):
        if old != new:
            break
        same += 1
    if -1 not in size:
        if differ(product(shape[same:]), product(size[same:])):
            raise NetworkError(f"{show(shape)} does not hold as many elements as {show(size)}")
        return ((size, self.dtype),)
    place = size.index(-1)
    known = product((*size[same:place], *size[place + 1 :]))
    total = product(shape[same:])
    rest = Dim.apply("//", total, known) if known != 0 else 0
    if isinstance(known, int) and isinstance(total, int) and known * rest != total:
        raise NetworkError(f"{show(shape)} cannot be viewed as {show(size)}")
    return ((replaced(size, place, rest), self.dtype),)


def like_second(self: Tensor, other: Tensor) -> Types:
    return ((other.shape, self.dtype),)


def transpose(self: Tensor, first: int, second: int) -> Types:
    shape = list(self.shape)
    if shape:
        i, j = axis(first, len(shape)), axis(second, len(shape))
        shape[i], shape[j] = shape[j], shape[i]
    return ((tuple(shape), self.dtype),)


def permute(self: Tensor, dims: Sequence[int]) -> Types:
    rank = len(self.shape)
    order = [axis(dim, rank) for dim in dims]
    if sorted(order) != list(range(rank)):
        raise NetworkError(f"{list(dims)} is no order of {rank} dimensions")
    return ((tuple(self.shape[i] for i in order), self.dtype),)


def t(self: Tensor) -> Types:
    if len(self.shape) > 2:
        raise NetworkError("t expects at most two dimensions")
    return ((self.shape[::-1], self.dtype),)


def reverse(self: Tensor) -> Types:
    return ((self.shape[::-1], self.dtype),)


def matrix_transpose(self: Tensor) -> Types:
    return transpose(self, -2, -1)


def movedim(self: Tensor, source: Sequence[int] | int, destination: Sequence[int] | int) -> Types:
    rank = len(self.shape)
    sources = [axis(dim, rank) for dim in ((source,) if isinstance(source, int) else source)]
    targets = [axis(dim, rank) for dim in ((destination,) if isinstance(destination, int) else destination)]
    placed = dict(zip(targets, sources, strict=True))
    others = iter(i for i in range(rank) if i not in sources)
    return ((tuple(self.shape[placed[i] if i in placed else next(others)] for i in range(rank)), self.dtype),)


def unsqueeze(self: Tensor, dim: int) -> Types:
    place = axis(dim, len(self.shape) + 1)
    return (((*self.shape[:place], 1, *self.shape[place:]), self.dtype),)


def squeeze(self: Tensor, dims: Sequence[int] | int | None = None) -> Types:
    rank = len(self.shape)
    chosen = range(rank) if dims is None else [axis(dim, rank) for dim in ((dims,) if isinstance(dims, int) else dims)]
    return ((tuple(size for i, size in enumerate(self.shape) if size != 1 or i not in chosen), self.dtype),)


def expand(self: Tensor, size: tuple, implicit: bool = False) -> Types:
    extra = len(size) - len(self.shape)
    if extra < 0:
        raise NetworkError(f"{show(self.shape)} cannot be expanded to {show(size)}")
    result = list(size)
    for i, present in enumerate(self.shape, extra):
        if result[i] == -1:
            result[i] = present
        elif present != 1:
            require_equal(present, result[i], "expanded size")
    if -1 in result:
        raise NetworkError(f"{show(self.shape)} cannot be expanded to {show(size)}: a new dimension has no size")
    return ((tuple(result), self.dtype),)


def expand_as(self: Tensor, other: Tensor) -> Types:
    return expand(self, other.shape)


def repeat(self: Tensor, repeats: tuple) -> Types:
    padded = (1,) * (len(repeats) - len(self.shape)) + self.shape
    if len(padded) != len(repeats):
        raise NetworkError("fewer repeats than dimensions")
    return ((tuple(size * times for size, times in zip(padded, repeats, strict=True)), self.dtype),)


def repeat_interleave(self: Tensor, repeats: Size, dim: int | None, output_size: Any = None) -> Types:
    if dim is None:
        return (((product(self.shape) * repeats,), self.dtype),)
    place = axis(dim, len(self.shape))
    return ((replaced(self.shape, place, self.shape[place] * repeats), self.dtype),)


def select(self: Tensor, dim: int, index: Size) -> Types:
    place = axis(dim, len(self.shape))
    size = self.shape[place]
    if isinstance(size, int) and isinstance(index, int) and not -size <= index < size:
        raise NetworkError(f"index {index} is out of range for size {size}")
    return ((self.shape[:place] + self.shape[place + 1 :], self.dtype),)


def slice_length(size: Size, start: Size | None, end: Size | None, step: int, ranges: Any) -> Size:
    """Elements of `range(size)[start:end:step]`."""
    if isinstance(size, int) and isinstance(start, (int, type(None))) and isinstance(end, (int, type(None))):
        return len(range(size)[start:end:step])
    first = _bound(0 if start is None else start, size, ranges)
    last = size if end is None or end == _END else _bound(end, size, ranges)
    if first == 0:
        return ceil_div(last, step)
    length = last - first
    if not at_most(0, length, ranges):
        length = Dim.apply("max", 0, length)
    return ceil_div(length, step)


def _bound(place: Size, size: Size, ranges: Any) -> Size:
    if isinstance(place, int) and place < 0:
        place = place + size
        return place if at_most(0, place, ranges) else Dim.apply("max", 0, place)
    return minimum(place, size, ranges)


def slice_(self: Tensor, dim: int, start: Size | None, end: Size | None, step: int) -> Types:
    place = axis(dim, len(self.shape))
    if step < 1:
        raise NetworkError("the step of a slice must be positive")
    length = slice_length(self.shape[place], start, end, step, self.network.ranges)
    return ((replaced(self.shape, place, length), self.dtype),)


def narrow(self: Tensor, dim: int, start: Any, length: Size) -> Types:
    return ((replaced(self.shape, axis(dim, len(self.shape)), length), self.dtype),)


def split(self: Tensor, size: Size, dim: int) -> Types:
    place = axis(dim, len(self.shape))
    total = self.shape[place]
    count = 1 if total == size else ceil_div(total, size) if isinstance(size, int) else Dim.apply("//", total, size)
    if not isinstance(count, int):
        raise NetworkError(f"the number of parts of size {size} of a dimension of size {total} is not known")
    _require_few(count)
    sizes = [size] * (count - 1) + [total - size * (count - 1)] if count else [0]
    return tuple((replaced(self.shape, place, part), self.dtype) for part in sizes)


def _require_few(count: Size) -> None:
    if not isinstance(count, int) or count > _MAX_PARTS:
        raise NetworkError(f"{count} parts are more than {_MAX_PARTS}")


def split_with_sizes(self: Tensor, sizes: tuple, dim: int) -> Types:
    place = axis(dim, len(self.shape))
    total: Size = 0
    for size in sizes:
        total = size + total
    require_equal(self.shape[place], total, "sum of the parts")
    return tuple((replaced(self.shape, place, part), self.dtype) for part in sizes)


def chunk(self: Tensor, chunks: int, dim: int) -> Types:
    place = axis(dim, len(self.shape))
    total = self.shape[place]
    if isinstance(total, int) and total:
        return split(self, max(1, -(-total // chunks)), dim)
    _require_few(chunks)
    part = total // chunks
    if part * chunks != total:
        raise NetworkError(f"a dimension of size {total} has no known {chunks} chunks")
    return split_with_sizes(self, (part,) * chunks, dim)


def unbind(self: Tensor, dim: int) -> Types:
    place = axis(dim, len(self.shape))
    count = self.shape[place]
    if not isinstance(count, int):
        raise NetworkError(f"a dimension of size {count} cannot be unbound")
    _require_few(count)
    return ((replaced(self.shape, place), self.dtype),) * count


def cat(tensors: Sequence[Tensor], dim: int) -> Types:
    kept = [tensor for tensor in tensors if tensor.shape != (0,)] or list(tensors[:1])
    if not kept:
        raise NetworkError("cat of no tensors")
    first = kept[0]
    rank = len(first.shape)
    place = axis(dim, rank)
    total: Size = first.shape[place]
    for tensor in kept[1:]:
        if len(tensor.shape) != rank:
            raise NetworkError(f"{show(first.shape)} and {show(tensor.shape)} have different ranks")
        for i in range(rank):
            if i != place:
                require_equal(first.shape[i], tensor.shape[i], f"dimension {i}")
        total = tensor.shape[place] + total
    uniform = all(tensor.dtype is first.dtype for tensor in tensors)
    return ((replaced(first.shape, place, total), first.dtype if uniform else result_type_of(tuple(tensors))),)


def stack(tensors: Sequence[Tensor], dim: int) -> Types:
    if not tensors:
        raise NetworkError("stack of no tensors")
    first = tensors[0]
    for tensor in tensors:
        if len(tensor.shape) != len(first.shape) or any(map(differ, tensor.shape, first.shape)):
            raise NetworkError(f"{show(first.shape)} and {show(tensor.shape)} cannot be stacked")
    place = axis(dim, len(first.shape) + 1)
    return (((*first.shape[:place], len(tensors), *first.shape[place:]), result_type_of(tuple(tensors))),)


def flatten(self: Tensor, start: int, end: int) -> Types:
    rank = len(self.shape)
    if not rank:
        return (((1,), self.dtype),)
    first, last = axis(start, rank), axis(end, rank)
    if first > last:
        raise NetworkError("flatten ends before it starts")
    return (((*self.shape[:first], product(self.shape[first : last + 1]), *self.shape[last + 1 :]), self.dtype),)


def unflatten(self: Tensor, dim: int, sizes: tuple) -> Types:
    place = axis(dim, len(self.shape))
    part = self.shape[place]
    if -1 in sizes:
        hole = sizes.index(-1)
        sizes = replaced(sizes, hole, Dim.apply("//", part, product((*sizes[:hole], *sizes[hole + 1 :]))))
    require_equal(part, product(sizes), "unflattened size")
    return ((replaced(self.shape, place, *sizes), self.dtype),)


def constant_pad(self: Tensor, padding: tuple, *rest: Any) -> Types:
    shape = list(self.shape)
    for i in range(len(padding) // 2):
        shape[-1 - i] = shape[-1 - i] + padding[2 * i] + padding[2 * i + 1]
    return ((tuple(shape), self.dtype),)


def broadcast_tensors(tensors: Sequence[Tensor]) -> Types:
    shape: Shape = ()
    for tensor in tensors:
        shape = broadcast(shape, tensor.shape)
    return tuple((shape, tensor.dtype) for tensor in tensors)


RULES = table(
    {
        "view reshape _unsafe_view": view,
        "view_as reshape_as": like_second,
        "transpose.int swapaxes swapdims": transpose,
        "permute": permute,
        "t": t,
        "numpy_T": reverse,
        "mT": matrix_transpose,
        "movedim.int movedim.intlist moveaxis.int moveaxis.intlist": movedim,
        "unsqueeze": unsqueeze,
        "squeeze squeeze.dim squeeze.dims": squeeze,
        "expand broadcast_to": expand,
        "expand_as": expand_as,
        "repeat tile": repeat,
        "repeat_interleave.self_int": repeat_interleave,
        "select.int": select,
        "slice.Tensor": slice_,
        "narrow": narrow,
        "split.Tensor unsafe_split.Tensor": split,
        "split_with_sizes split.sizes unsafe_split_with_sizes": split_with_sizes,
        "chunk unsafe_chunk": chunk,
        "unbind.int": unbind,
        "cat concat concatenate": cat,
        "stack": stack,
        "flatten.using_ints": flatten,
        "unflatten.int": unflatten,
        "constant_pad_nd pad": constant_pad,
        "broadcast_tensors": broadcast_tensors,
    }
)
