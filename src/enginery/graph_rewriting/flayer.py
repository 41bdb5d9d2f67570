"""The high-level call behind a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from enginery import network as ir
from enginery import ops
from enginery.errors import UsageError
from enginery.graph_rewriting.views import EDITS, Network, Tensor, default_net, unwrap, wrap


class _Inputs(dict):
    """Arguments of a call by name; what is set is kept beside the layer, for the call that a rule makes next."""

    def __init__(self, values: dict[str, Any], changes: dict[str, Any]) -> None:
        super().__init__({**values, **changes})
        self._changes = changes

    def __setitem__(self, name: str, value: Any) -> None:
        self._changes[name] = value
        super().__setitem__(name, value)


class FLayerInfo:
    """The high-level call behind a layer. Here the layer *is* that call: everything is read off it on each access."""

    def __init__(self, layer: ir.Layer) -> None:
        self.layer = layer
        self._changes: dict[str, Any] = {}

    layer_name = property(lambda self: self.layer.name)
    layer_kind = property(lambda self: ir.signature(self.layer.op).short_name)
    raw_outputs = property(lambda self: [Tensor._of(output) for output in self.layer.outputs])

    @property
    def raw_inputs(self) -> dict[str, Any]:
        return _Inputs({name: wrap(value) for name, value in self.layer.arguments.items()}, self._changes)

    @property
    def signature(self) -> tuple:
        """Kind and arguments, tensors replaced by their class; hashable."""
        return self.layer_kind, tuple((name, _symbol(value)) for name, value in self.layer.arguments.items())

    def get_input(self, name: str) -> Any:
        return self.raw_inputs[name]

    def clone_inputs(self) -> dict[str, Any]:
        return dict(self.raw_inputs)

    def replace_input_with(self, src: Tensor, dst: Tensor) -> None:
        """The layer reads `dst` wherever it read `src`; in a rule, by a new call that takes its place."""
        if EDITS.get() is None:
            self.layer.replace_input(src.tensor, dst.tensor)
            return
        changed = {k: dst.tensor if v is src.tensor else v for k, v in self.layer.arguments.items()}
        new = self.layer.replace(**changed)
        self.replace_outputs_uses_with(Network(self.layer.network), wrap(new if isinstance(new, tuple) else (new,)))

    def replace_outputs_uses_with(self, net: Network, new_outs: Any) -> None:
        new = list(new_outs) if isinstance(new_outs, (list, tuple)) else [new_outs]
        if len(new) != len(self.layer.outputs):
            raise UsageError(f"{len(new)} outputs are given for {len(self.layer.outputs)} of {self.layer.name}")
        for old, other in zip(self.raw_outputs, new, strict=True):
            old.replace_all_uses_with(other)

    def __hash__(self) -> int:
        return hash(self.signature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FLayerInfo) and self.layer is other.layer

    def __repr__(self) -> str:
        return f"<FLayer {self.signature}>"


def _symbol(value: Any) -> Any:
    return Tensor if isinstance(value, ir.Tensor) else tuple(map(_symbol, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class FLayerInfoMemo:
    """A view of a network by layer names. There is nothing to add to it and nothing to remove."""

    network: Network

    @staticmethod
    def instance() -> FLayerInfoMemo:
        return FLayerInfoMemo(default_net())

    def get(self, layer_name: str) -> FLayerInfo | None:
        layer = self.network.get_layer_by_name(layer_name)
        return None if layer is None else FLayerInfo(layer.layer)

    def remove(self, layer_name: str) -> None:
        """Kept for callers: what a layer is ends with the layer."""

    data = property(lambda self: {layer.name: FLayerInfo(layer.layer) for layer in self.network.get_layers()})


def record_signature(function: Callable) -> Callable:
    """Kept for callers: calls record themselves, so nothing is recorded here and functions may nest and raise."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@record_signature
def gpt_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    q_scaling: float = 1.0,
    qkv_bias: Tensor | None = None,
) -> Tensor:
    """`enginery.ops.gpt_attention` in the current network."""
    args = (num_heads, num_kv_heads, head_size, q_scaling, qkv_bias)
    return wrap(qkv.tensor.network.call(ops.gpt_attention, qkv.tensor, *map(unwrap, args)))
