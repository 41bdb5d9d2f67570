"""f(x), which nobody reads = nothing"""

from __future__ import annotations

from typing import Any

from enginery.network import Layer
from enginery.rewriting.rule import PatternRewriter


class DeadCode(PatternRewriter):
    pure = True
    root_layer = None

    def match_and_rewrite(self, layer: Layer) -> Any:
        read = any(output.users or output.is_output for output in layer.outputs)
        return None if read or layer.has_effects else {}
