"""A network from any torch module that torch.export can trace. The module may be on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from enginery.network import Network


def load(
    module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> Network:
    """The network of `module(*args, **kwargs)`; see `Network.from_module`."""
    return Network.from_module(module, args, kwargs, dynamic_shapes)
