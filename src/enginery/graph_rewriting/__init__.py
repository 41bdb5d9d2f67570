"""The names of TensorRT-LLM 0.5's `graph_rewriting` over our networks, for code that moves over by changing one import.

    from enginery.graph_rewriting import *     # was: from tensorrt_llm.graph_rewriting import *; import tensorrt as trt

Everything here is a view: a `Layer` or `Tensor` holds ours and no state of its own, a `FLayerInfo` reads the call
that its layer is. While a manager runs a rule, `replace_all_uses_with` and `mark_as_removed` are noted and carried
out when the rule returns true, so a rule that raises leaves no trace; outside of that they act at once. What the
original kept in singletons (the current network, the managers that `instance()` gives) is kept per context
(`contextvars`): threads do not see each other.
"""

from __future__ import annotations

from enginery.graph_rewriting.flayer import FLayerInfo, FLayerInfoMemo, gpt_attention, record_signature
from enginery.graph_rewriting.managers import (
    AnalysisPatternManager,
    FuseAttentionWithBiasPass,
    PatternAnalyzer,
    PatternRewriter,
    RewritePatternManager,
    optimize,
)
from enginery.graph_rewriting.trt import ElementWiseOperation, trt
from enginery.graph_rewriting.views import Layer, Network, Tensor, default_net, net_guard
from enginery.network.kind import LayerKind

__all__ = [
    "AnalysisPatternManager", "ElementWiseOperation", "FLayerInfo", "FLayerInfoMemo", "FuseAttentionWithBiasPass",
    "Layer", "LayerKind", "Network", "PatternAnalyzer", "PatternRewriter", "RewritePatternManager", "Tensor",
    "default_net", "gpt_attention", "net_guard", "optimize", "record_signature", "trt",
]  # fmt: skip
