"""Rules and analyzers in the form of TensorRT-LLM 0.5, their managers, and its one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

from enginery import network as ir
from enginery import rewriting
from enginery.errors import RewriteError
from enginery.graph_rewriting.flayer import FLayerInfo, gpt_attention
from enginery.graph_rewriting.trt import ElementWiseOperation
from enginery.graph_rewriting.views import EDITS, Layer, Network, default_net, net_guard
from enginery.network.kind import LayerKind

_REWRITERS: ContextVar[RewritePatternManager | None] = ContextVar("enginery_rewrite_manager", default=None)
_ANALYZERS: ContextVar[AnalysisPatternManager | None] = ContextVar("enginery_analysis_manager", default=None)


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
        token = EDITS.set(edits)
        try:
            if self.rule.separate_match_rewrite:
                if not self.rule.match(view):
                    raise rewriting.MatchFailure("match returned False")
                self.rule.rewrite(view)
            elif not self.rule.match_and_rewrite(view):
                raise rewriting.MatchFailure("match_and_rewrite returned False")
        finally:
            EDITS.reset(token)
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
