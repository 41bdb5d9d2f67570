"""A value of a network: a name, a shape, a dtype, the layer that makes it and the layers that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from enginery.network.dim import Size

if TYPE_CHECKING:
    from enginery.network.layer import Layer
    from enginery.network.network import Network


class Tensor:
    """Made by a network only (`add_input`, `add_constant`, `call`), never by hand."""

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
        self.output_names: list[str] = []
        self._uses: dict[Layer, int] = {}
        """each layer that reads this value, and how often it does (`y + y` reads y twice)"""

    @property
    def users(self) -> list[Layer]:
        """The layers that read this value, each once, in execution order."""
        users = list(self._uses)
        if len(users) > 1:
            users.sort(key=lambda layer: layer.order)
        return users

    @property
    def is_input(self) -> bool:
        return self.parent is None and not self.is_constant

    @property
    def is_output(self) -> bool:
        return bool(self.output_names)

    @property
    def rank(self) -> int:
        return len(self.shape)

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
        self.output_names = []

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"%{self.name}: {str(self.dtype).removeprefix('torch.')}[{shape}]"
