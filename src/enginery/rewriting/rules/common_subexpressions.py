"""f(x), f(x) = y, y with y = f(x)

Only calls of one repeated block are merged (or of none): a value shared between decoder layers would make the first of
them unlike the others, and the engine compiles one layer for all.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from enginery.network import Layer, Tensor
from enginery.rewriting.rule import PatternRewriter

MANY = 16
"""users of a value that has some in every block, such as a rotary table: those of other blocks are not compared"""


class CommonSubexpressions(PatternRewriter):
    pure = True
    root_layer = None

    def match_and_rewrite(self, layer: Layer) -> Any:
        inputs = layer.inputs
        if not inputs or layer.has_effects:
            return None
        fewest = min(inputs, key=lambda tensor: tensor.user_count)
        users = fewest.users
        earlier = reversed(users[: users.index(layer)])
        if len(users) > MANY:
            earlier = takewhile(lambda other: block_of(other.module_path) == block_of(layer.module_path), earlier)
        for other in earlier:
            if other.op is layer.op and _same(other.args, layer.args):
                return other.outputs if block_of(other.module_path) == block_of(layer.module_path) else None
        return None


def block_of(path: str) -> str:
    """The innermost numbered module around a call: `model.layers.3` of `model.layers.3.mlp.up_proj`, or ""."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else ""


def _same(one: object, other: object) -> bool:
    """Equal, and of equal types: 1 and 1.0 make different calls."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)
