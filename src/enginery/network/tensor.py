"""A value of a network: a name, a shape, a dtype, the layer that makes it and the layers that use it."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Size
from enginery.network.functions import resolve
from enginery.network.methods import TensorMethods
from enginery.network.operator import signature

if TYPE_CHECKING:
    from enginery.network.layer import Layer
    from enginery.network.network import Network


class Tensor(TensorMethods):
    """Made by a network only (`add_input`, `add_constant`, `call`), never by hand.

    PyTorch over Tensors (functions, methods, operators, `torch.ops`) appends calls to their network.
    """

    __slots__ = ("_uses", "dtype", "index", "is_constant", "name", "network", "output_names", "parent", "shape")

    def __init__(
        self, network: Network, name: str, shape: tuple[Size, ...], dtype: torch.dtype, parent: Layer | None, index: int
    ) -> None:
        self.network = network
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.parent = parent
        self.index = index
        """place among the outputs of `parent`"""
        self.is_constant = False
        """known at build time: a named constant, or computed from constants alone"""
        self.output_names: tuple[str, ...] = ()
        """the names under which the network returns it"""
        self._uses: dict[Layer, int] = {}
        """each layer that reads this value, and how often it does (`y + y` reads y twice)"""

    @property
    def users(self) -> list[Layer]:
        """The layers that read this value, each once, in execution order."""
        users = list(self._uses)
        if len(users) > 1:
            users.sort(key=_order)
        return users

    @property
    def user_count(self) -> int:
        """`len(users)`, without putting them in order."""
        return len(self._uses)

    @property
    def is_input(self) -> bool:
        return self.parent is None and not self.is_constant

    @property
    def is_output(self) -> bool:
        return bool(self.output_names)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Size:
        total: Size = 1
        for size in self.shape:
            total = size * total
        return total

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        op, values = resolve(function, args, kwargs)
        outputs = _network_of(values).add_layer(op, values).outputs
        known = signature(op)
        if known.is_single:
            return outputs[0]
        return known.bundle(*outputs) if known.bundle is not None else outputs

    def replace_all_uses_with(self, other: Tensor) -> None:
        """Every layer and every network output that reads this value reads `other` instead.

        The layers that read it must come after `other` is computed (`Network.verify` checks).
        """
        if other is self:
            return
        for layer in list(self._uses):
            layer.replace_input(self, other)
        for name in self.output_names:
            self.network.set_output(name, other, keep_old=True)
        self.output_names = ()

    def __bool__(self) -> bool:
        raise NetworkError(
            "a tensor of a network is neither true nor false: it has no value yet",
            "Choose by torch.where, or test its shape, its dtype or `is None`",
        )

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"%{self.name}: {str(self.dtype).removeprefix('torch.')}[{shape}]"


_order = attrgetter("order")


def _network_of(values: tuple) -> Network:
    for value in values:
        if value.__class__ is Tensor:
            return value.network
        if value.__class__ is tuple:
            for item in value:
                if item.__class__ is Tensor:
                    return item.network
    raise NetworkError("a call without a tensor names no network", "Use Network.call")
