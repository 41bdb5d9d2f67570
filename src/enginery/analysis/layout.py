"""Shapes and memory of a network's values in one step.

Views are run on tensors without data, so torch says what aliases what. A layer whose result lies in the memory of its
input moves nothing; a reshape that cannot be a view is a copy and does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from enginery.errors import UsageError
from enginery.network.dim import Dim, evaluate
from enginery.network.layer import Layer
from enginery.network.operator import Operator, signature
from enginery.network.tensor import Tensor


class Layout:
    """Of one network, with its symbolic sizes replaced by numbers. Raises UsageError where a symbol has no value."""

    def __init__(self, symbols: Mapping[str, int]) -> None:
        self._symbols = symbols
        self._values: dict[Tensor, torch.Tensor] = {}
        self._bases: dict[Tensor, Tensor] = {}

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self.value(size) for size in tensor.shape)

    def numel(self, tensor: Tensor) -> int:
        return math.prod(self.shape(tensor))

    def nbytes(self, tensor: Tensor) -> int:
        """Distinct bytes of a value: an expanded dimension counts once."""
        known = self._meta(tensor)
        sizes = (size for size, stride in zip(known.shape, known.stride(), strict=True) if stride != 0)
        return math.prod(sizes) * known.element_size()

    def base(self, tensor: Tensor) -> Tensor:
        """The value in whose memory it lies: itself, unless it is a view."""
        self._meta(tensor)
        return self._bases[tensor]

    def ancestors(self, tensor: Tensor) -> Iterator[Tensor]:
        """The values that a view is a part of, from the nearest to its base."""
        base = self.base(tensor)
        while tensor is not base and tensor.parent is not None:
            tensor = next(source for source in tensor.parent.inputs if self.base(source) is base)
            yield tensor

    def is_view(self, layer: Layer) -> bool:
        """All its results lie in memory that is there already."""
        return all(self.base(output).parent is not layer for output in layer.outputs)

    def value(self, argument: Any) -> Any:
        """An argument of a layer with symbolic sizes as numbers and tensors as tensors without data."""
        if isinstance(argument, Dim):
            try:
                return evaluate(argument, self._symbols)
            except KeyError as error:
                raise UsageError(f"size {error.args[0]} has no value", "Name it in the sizes of the step") from None
        if isinstance(argument, Tensor):
            return self._meta(argument)
        return [self.value(item) for item in argument] if isinstance(argument, tuple) else argument

    def _meta(self, tensor: Tensor) -> torch.Tensor:
        if tensor not in self._values:
            layer = tensor.parent
            if layer is None or not _may_alias(layer.op):
                self._values[tensor] = torch.empty(self.shape(tensor), dtype=tensor.dtype, device="meta")
                self._bases[tensor] = tensor
            else:
                self._run(layer)
        return self._values[tensor]

    def _run(self, layer: Layer) -> None:
        known = signature(layer.op)
        filled = [self.value(argument) for argument in layer.args]
        args = [value for i, value in enumerate(filled) if i not in known.keyword_only]
        results = layer.op(*args, **{known.names[i]: filled[i] for i in known.keyword_only})
        owners = {_storage(self._values[tensor]): self._bases[tensor] for tensor in layer.inputs}
        results = (results,) if isinstance(results, torch.Tensor) else results
        for output, result in zip(layer.outputs, results, strict=True):
            self._values[output] = result
            self._bases[output] = owners.get(_storage(result), output)


@cache
def _may_alias(op: Operator) -> bool:
    """Its schema lets a result share an argument's memory."""
    marks = [argument.alias_info for argument in op._schema.arguments]
    return any(mark is not None and not mark.is_write for mark in marks)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
