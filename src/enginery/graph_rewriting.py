"""The names of TensorRT-LLM 0.5's `graph_rewriting` over our networks, for code that moves over by changing one import.

    from enginery.graph_rewriting import *     # was: from tensorrt_llm.graph_rewriting import *; import tensorrt as trt

Everything here is a view: a `Layer` or `Tensor` holds ours and no state of its own, a `FLayerInfo` reads the call
that its layer is. While a manager runs a rule, `replace_all_uses_with` and `mark_as_removed` are noted and carried
out when the rule returns true, so a rule that raises leaves no trace; outside of that they act at once. What the
original kept in singletons (the current network, the managers that `instance()` gives) is kept per context
(`contextvars`): threads do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from enginery import network as ir
from enginery import ops, rewriting
from enginery.errors import RewriteError, UsageError
from enginery.network.kind import LayerKind
from enginery.network.methods import TensorMethods

_NETWORK: ContextVar[Network | None] = ContextVar("enginery_default_network", default=None)
_EDITS: ContextVar[dict[ir.Tensor, ir.Tensor] | None] = ContextVar("enginery_noted_edits", default=None)
_REWRITERS: ContextVar[RewritePatternManager | None] = ContextVar("enginery_rewrite_manager", default=None)
_ANALYZERS: ContextVar[AnalysisPatternManager | None] = ContextVar("enginery_analysis_manager", default=None)


class ElementWiseOperation(Enum):
    SUM, PROD, MAX, MIN, SUB, DIV, POW = "add", "mul", "maximum", "minimum", "sub", "div", "pow"
    FLOOR_DIV, AND, OR, XOR = "floor_divide", "logical_and", "logical_or", "logical_xor"
    EQUAL, GREATER, LESS = "eq", "gt", "lt"


trt = SimpleNamespace(
    LayerType=LayerKind, ElementWiseOperation=ElementWiseOperation, float32=torch.float32, float16=torch.float16,
    bfloat16=torch.bfloat16, int32=torch.int32, int8=torch.int8, bool=torch.bool,
)  # fmt: skip
"""What rules of that time use of `import tensorrt as trt`."""


def _unwrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tensor
    if isinstance(value, dict):
        return {name: _unwrap(item) for name, item in value.items()}
    return type(value)(map(_unwrap, value)) if isinstance(value, (list, tuple)) else value


def _wrap(value: Any) -> Any:
    if isinstance(value, ir.Tensor):
        return Tensor._of(value)
    return type(value)(map(_wrap, value)) if isinstance(value, (list, tuple)) else value


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
        return _wrap(ir.Tensor.__torch_function__(function, types, _unwrap(args), _unwrap(kwargs or {})))

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
        noted = _EDITS.get()
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
        noted = _EDITS.get() or {}
        return self.layer.is_removed or (bool(self.layer.outputs) and all(o in noted for o in self.layer.outputs))

    def mark_as_removed(self) -> None:
        """Erases the layer if nobody reads it; a layer that is still read is an error, not a dangling node."""
        if _EDITS.get() is None:
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
        return _Inputs({name: _wrap(value) for name, value in self.layer.arguments.items()}, self._changes)

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
        if _EDITS.get() is None:
            self.layer.replace_input(src.tensor, dst.tensor)
            return
        changed = {k: dst.tensor if v is src.tensor else v for k, v in self.layer.arguments.items()}
        new = self.layer.replace(**changed)
        self.replace_outputs_uses_with(Network(self.layer.network), _wrap(new if isinstance(new, tuple) else (new,)))

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
    return _wrap(qkv.tensor.network.call(ops.gpt_attention, qkv.tensor, *map(_unwrap, args)))


class _Pattern:
    def __init__(self, name: str, root_layer: Collection[LayerKind] | None = None) -> None:
        self.name, self.root_layer = name, root_layer
        self.args: dict[str, Any] = {}
        """what `rewrite(net, args)` gives is laid over it"""


class PatternRewriter(_Pattern):
    """Override `match` and `rewrite` (with `separate_match_rewrite`), or `match_and_rewrite` (true: changed)."""

    def __init__(
        self,
        name: str,
        root_layer: Collection[LayerKind] | None = None,
        separate_match_rewrite: bool = False,
        seperate_match_rewrite: bool = False,
    ) -> None:
        super().__init__(name, root_layer)
        self.separate_match_rewrite = separate_match_rewrite or seperate_match_rewrite

    def match(self, layer: Layer) -> bool:
        raise NotImplementedError

    def rewrite(self, layer: Layer) -> None:
        raise NotImplementedError

    def match_and_rewrite(self, layer: Layer) -> bool:
        raise NotImplementedError


class PatternAnalyzer(_Pattern):
    def match(self, layer: Layer) -> Any:
        """A list of layers for `analyze`, or True for this layer alone; false: no match."""
        raise NotImplementedError

    def analyze(self, subgraph: list[Layer]) -> None:
        raise NotImplementedError


class _Adapted(rewriting.PatternRewriter):
    """A rule of that time as one of ours: what it did to the network is what it returns."""

    changes_shape = changes_dtype = removes_effects = True

    def __init__(self, rule: PatternRewriter) -> None:
        self.rule, self.root_layer = rule, rule.root_layer

    def match_and_rewrite(self, layer: ir.Layer) -> Any:
        view = Layer(layer)
        edits: dict[ir.Tensor, ir.Tensor] = {}
        token = _EDITS.set(edits)
        try:
            if self.rule.separate_match_rewrite:
                if not self.rule.match(view):
                    raise rewriting.MatchFailure("match returned False")
                self.rule.rewrite(view)
            elif not self.rule.match_and_rewrite(view):
                raise rewriting.MatchFailure("match_and_rewrite returned False")
        finally:
            _EDITS.reset(token)
        return edits or None


class _Manager:
    def __init__(self) -> None:
        self.patterns: dict[str, tuple[int, Any]] = {}

    def add(self, label: str, pattern: Any, benefit: int = 0) -> None:
        if label in self.patterns:
            raise RewriteError(f"two patterns are labelled {label}", "Give one of them another label", rule=label)
        self.patterns[label] = benefit, pattern

    def get(self, label: str) -> Any:
        return self.patterns[label][1]

    def _prepared(self, args: Mapping[str, Any] | None) -> list[tuple[str, int, Any]]:
        """Highest benefit first, each with the arguments of this run over its own."""
        for _, pattern in self.patterns.values():
            pattern.args = {**(pattern.args or {}), **(args or {})}
        ordered = sorted(self.patterns.items(), key=lambda item: -item[1][0])
        return [(label, benefit, pattern) for label, (benefit, pattern) in ordered]


class RewritePatternManager(_Manager):
    def rewrite(self, net: Network | ir.Network, args: Mapping[str, Any] | None = None) -> rewriting.Report:
        manager = rewriting.RewritePatternManager()
        for label, benefit, pattern in self._prepared(args):
            manager.add(label, _Adapted(pattern), benefit)
        with net_guard(net):
            return manager.rewrite(default_net().network)

    @staticmethod
    def instance() -> RewritePatternManager:
        """The manager of this context (thread or task), made when first asked for."""
        return _in_context(_REWRITERS, RewritePatternManager)


class AnalysisPatternManager(_Manager):
    def analyze(self, graph: Network | ir.Network, args: Mapping[str, Any] | None = None) -> None:
        patterns = self._prepared(args)
        with net_guard(graph), default_net().network.guarded(append=False):
            for layer in default_net().get_layers():
                for _, _, pattern in patterns:
                    if pattern.root_layer is None or layer.type in pattern.root_layer:
                        found = pattern.match(layer)
                        if found:
                            pattern.analyze([layer] if found is True else found)

    @staticmethod
    def instance() -> AnalysisPatternManager:
        return _in_context(_ANALYZERS, AnalysisPatternManager)


def _in_context(variable: ContextVar, make: Callable) -> Any:
    if variable.get() is None:
        variable.set(make())
    return variable.get()


class FuseAttentionWithBiasPass(PatternRewriter):
    """gpt_attention(qkv + b)  ->  gpt_attention(qkv, qkv_bias=b), if nobody else reads the sum."""

    def __init__(self) -> None:
        super().__init__("fuse_attention_with_bias", {LayerKind.PLUGIN_V2})

    def match_and_rewrite(self, layer: Layer) -> bool:
        info = FLayerInfo(layer.layer)
        if info.layer_kind != "gpt_attention" or info.get_input("qkv_bias") is not None:
            return False
        total = info.get_input("qkv")
        parent = total.get_parent()
        if parent is None or parent.as_layer().op is not ElementWiseOperation.SUM or len(total.get_users()) != 1:
            return False
        fixed = [tensor for tensor in parent.get_inputs() if tensor.tensor.is_constant]
        others = [tensor for tensor in parent.get_inputs() if not tensor.tensor.is_constant]
        if len(fixed) != 1 or len(others) != 1 or others[0].shape != total.shape:
            return False
        new = gpt_attention(**{**info.clone_inputs(), "qkv": others[0], "qkv_bias": fixed[0]})
        info.replace_outputs_uses_with(layer.network, new)
        layer.mark_as_removed()
        return True


def optimize(net: Network | ir.Network) -> rewriting.Report:
    patterns = RewritePatternManager()
    patterns.add("fuse_attention_with_bias", FuseAttentionWithBiasPass())
    return patterns.rewrite(net)


__all__ = [
    "AnalysisPatternManager", "ElementWiseOperation", "FLayerInfo", "FLayerInfoMemo", "FuseAttentionWithBiasPass",
    "Layer", "LayerKind", "Network", "PatternAnalyzer", "PatternRewriter", "RewritePatternManager", "Tensor",
    "default_net", "gpt_attention", "net_guard", "optimize", "record_signature", "trt",
]  # fmt: skip
