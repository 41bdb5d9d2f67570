"""Tensors, layers and networks as rules of TensorRT-LLM 0.5 see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from enginery import network as ir
from enginery.errors import UsageError
from enginery.graph_rewriting.trt import ElementWiseOperation
from enginery.network.methods import TensorMethods

_NETWORK: ContextVar[Network | None] = ContextVar("enginery_default_network", default=None)
EDITS: ContextVar[dict[ir.Tensor, ir.Tensor] | None] = ContextVar("enginery_noted_edits", default=None)
"""what the rule that runs has replaced so far; None: no rule runs"""


def unwrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tensor
    if isinstance(value, dict):
        return {name: unwrap(item) for name, item in value.items()}
    return type(value)(map(unwrap, value)) if isinstance(value, (list, tuple)) else value


def wrap(value: Any) -> Any:
    if isinstance(value, ir.Tensor):
        return Tensor._of(value)
    return type(value)(map(wrap, value)) if isinstance(value, (list, tuple)) else value


class Tensor(TensorMethods):
    """A value. Made with a name, a dtype and a shape, it is a new input of the current network."""

    def __init__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.tensor = default_net().network.add_input(name, tuple(shape), dtype)

    @classmethod
    def _of(cls, tensor: ir.Tensor) -> Tensor:
        view = cls.__new__(cls)
        view.tensor = tensor
        return view

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return wrap(ir.Tensor.__torch_function__(function, types, unwrap(args), unwrap(kwargs or {})))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return hash(self.tensor)

    name = property(lambda self: self.tensor.name)
    shape = property(lambda self: self.tensor.shape)
    dtype = property(lambda self: self.tensor.dtype)
    rank = property(lambda self: self.tensor.rank)
    network = property(lambda self: Network(self.tensor.network))

    def get_parent(self) -> Layer | None:
        return None if self.tensor.parent is None else Layer(self.tensor.parent)

    def get_users(self) -> list[Layer]:
        return [Layer(user) for user in self.tensor.users]

    def replace_all_uses_with(self, other: Tensor) -> None:
        """Network outputs included."""
        noted = EDITS.get()
        if noted is None:
            self.tensor.replace_all_uses_with(other.tensor)
        else:
            noted[self.tensor] = other.tensor


@dataclass(frozen=True)
class Layer:
    """A layer. `as_layer()` shows it with the attributes of TensorRT's classes; `layer.layer` is ours."""

    layer: ir.Layer

    name = property(lambda self: self.layer.name)
    type = property(lambda self: self.layer.kind)
    network = property(lambda self: Network(self.layer.network))

    def get_inputs(self, *indices: int) -> list[Tensor]:
        inputs = self.layer.inputs
        return [Tensor._of(inputs[i]) for i in indices or range(len(inputs))]

    def get_outputs(self, *indices: int) -> list[Tensor]:
        return [Tensor._of(self.layer.outputs[i]) for i in indices or range(len(self.layer.outputs))]

    def is_removed(self) -> bool:
        noted = EDITS.get() or {}
        return self.layer.is_removed or (bool(self.layer.outputs) and all(o in noted for o in self.layer.outputs))

    def mark_as_removed(self) -> None:
        """Erases the layer if nobody reads it; a layer that is still read is an error, not a dangling node."""
        if EDITS.get() is None:
            self.layer.network.erase(self.layer)

    def as_layer(self) -> Any:
        known = ir.signature(self.layer.op)
        names = {operation.value: operation for operation in ElementWiseOperation}
        plugin = SimpleNamespace(
            plugin_namespace="tensorrt_llm",
            plugin_type="".join(
                part.upper() if part == "gpt" else part.capitalize() for part in known.short_name.split("_")
            ),
            num_outputs=len(self.layer.outputs),
        )
        return SimpleNamespace(type=self.type, name=self.name, op=names.get(known.short_name), plugin=plugin)


@dataclass(frozen=True)
class Network:
    """What rules of that time ask of a network. `net.network` is ours."""

    network: ir.Network

    def get_layers(self) -> list[Layer]:
        return [Layer(layer) for layer in self.network]

    def get_inputs(self) -> list[Tensor]:
        return [Tensor._of(tensor) for tensor in self.network.inputs]

    def get_outputs(self) -> list[Tensor]:
        return [Tensor._of(tensor) for tensor in self.network.outputs]

    def get_layer_by_name(self, name: str) -> Layer | None:
        return next((layer for layer in self.get_layers() if layer.name == name), None)

    def is_input(self, tensor: Tensor) -> bool:
        return tensor.tensor.is_input

    def is_output(self, tensor: Tensor) -> bool:
        return tensor.tensor.is_output

    def to_dot(self) -> str:
        return self.network.to_dot()


@contextmanager
def net_guard(net: Network | ir.Network) -> Any:
    """Makes a network the current one. The former one comes back however the block ends."""
    token = _NETWORK.set(net if isinstance(net, Network) else Network(net))
    try:
        yield
    finally:
        _NETWORK.reset(token)


def default_net() -> Network:
    net = _NETWORK.get()
    if net is None:
        raise UsageError("there is no current network", "Work inside `with net_guard(net):`")
    return net
