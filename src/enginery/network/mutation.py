"""Functionalisation at import: calls that write to an intermediate become calls that make a new one.

x.add_(1)            ->  x' = x + 1,                        later readers of x read x'
x[:, :2].fill_(0)    ->  x' = slice_scatter(x, fill(x[:, :2], 0), …),  and so for its other views
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from enginery.errors import NetworkError
from enginery.network.functions import resolve
from enginery.network.layer import Layer
from enginery.network.operator import Operator, operator_name
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    from enginery.network.network import Network

aten = torch.ops.aten

_VIEWS = frozenset(
    {
        "view", "transpose", "permute", "t", "numpy_T", "mT", "unsqueeze", "squeeze", "select", "slice", "narrow",
        "expand", "view_as", "expand_as", "flatten", "unflatten", "diagonal", "unfold", "split", "split_with_sizes",
        "chunk", "unbind", "swapaxes", "movedim",
    }
)  # fmt: skip
_PERHAPS_VIEWS = frozenset({"reshape", "contiguous", "reshape_as"})


class Mutations:
    """Which value a tensor of the program stands for now."""

    def __init__(self) -> None:
        self._updated: dict[Tensor, Tensor] = {}
        self._views: dict[Tensor, Layer] = {}
        self._again: dict[tuple[Tensor, Tensor], Tensor] = {}

    def note(self, layer: Layer) -> None:
        """Remembers that the outputs of a layer are views of its first input."""
        name = layer.op._opname
        if name in _VIEWS or name in _PERHAPS_VIEWS or (name == "to" and layer.args[0].dtype == layer.outputs[0].dtype):
            for output in layer.outputs:
                self._views[output] = layer

    def current(self, value: Any) -> Any:
        """The value after all writes so far."""
        if not self._updated or not isinstance(value, Tensor):
            return value
        while value in self._updated:
            value = self._updated[value]
        view = self._views.get(value)
        if view is None:
            return value
        base = self.current(view.args[0])
        if base is view.args[0]:
            return value
        if (value, base) not in self._again:
            self._refuse_uncertain(view)
            network = base.network
            with network.inserting_before(None, module_path=view.module_path):
                again = network.add_layer(view.op, (base, *view.args[1:]))
            self.note(again)
            for old, new in zip(view.outputs, again.outputs, strict=True):
                self._again[old, base] = new
        return self._again[value, base]

    def apply(self, network: Network, op: Operator, args: tuple, kwargs: Mapping[str, Any], place: str) -> Tensor:
        """Appends the functional form of a call that writes to its first argument; gives that argument."""
        target = args[0]
        if not isinstance(target, Tensor) or self._root(target).parent is None:
            raise NetworkError(f"{operator_name(op)} at {place} writes to an input or a constant of the model")
        functional, values = resolve(_functional(op, place), args, kwargs)
        value = network.add_layer(functional, values).outputs[0]
        if value.dtype != target.dtype:
            value = network.add_layer(*resolve(aten.to.dtype, (value, target.dtype))).outputs[0]
        self._write(network, target, value, place)
        return target

    def _write(self, network: Network, target: Tensor, value: Tensor, place: str) -> None:
        view = self._views.get(target)
        if view is None:
            self._updated[target] = value
            return
        self._refuse_uncertain(view)
        base = view.args[0]
        name = view.op._opname
        if name == "slice":
            call = (aten.slice_scatter.default, (base, value, *view.args[1:]))
        elif name == "select":
            call = (aten.select_scatter.default, (base, value, *view.args[1:]))
        elif name in ("view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as"):
            call = (aten.reshape.default, (value, base.shape))
        elif name in ("transpose", "t", "numpy_T", "mT", "swapaxes"):
            call = (view.op, (value, *view.args[1:]))
        elif name == "permute":
            order = [dim % base.rank for dim in view.args[1]]
            call = (aten.permute.default, (value, tuple(order.index(i) for i in range(base.rank))))
        else:
            raise NetworkError(f"the write at {place} goes through {operator_name(view.op)}, which cannot be undone")
        self._write(network, base, network.add_layer(*resolve(*call)).outputs[0], place)

    def _root(self, tensor: Tensor) -> Tensor:
        while tensor in self._views:
            tensor = self._views[tensor].args[0]
        return tensor

    @staticmethod
    def _refuse_uncertain(view: Layer) -> None:
        if view.op._opname in _PERHAPS_VIEWS:
            raise NetworkError(
                f"a write passes through {view.name}, which may or may not copy", "Use view or clone in the model"
            )


def _functional(op: Operator, place: str) -> Operator:
    name = op._opname
    base = f"__{name[3:-2]}__" if name.startswith("__i") else name.rstrip("_")
    found = getattr(getattr(aten, base, None), op._overloadname, None)
    if op.namespace != "aten" or not isinstance(found, Operator):
        raise NetworkError(f"{operator_name(op)} at {place} writes to its arguments and has no functional form")
    return found


__all__ = ["Mutations"]
