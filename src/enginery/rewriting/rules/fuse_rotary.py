"""paged_attention(rotate(q), rotate(k), v, …) = rotary_paged_attention(q, k, v, cos, sin, …)

with rotate(x) = x·cos + turn(x)·sin and turn(first half, second half) = (−second, first): rotary embedding of whole
heads, as Llama has it. One operator rotates, writes keys and values to the cache and attends.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.pattern import Scalar, Var
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten


def _rotation() -> Any:
    x = Var("x", rank=4)
    second = aten.slice.Tensor(x, Scalar("dim"), Scalar("start"), ..., 1)
    first = aten.slice.Tensor(x, Scalar("dim"), ..., Scalar("end"), 1).bind("first")
    return x * Var("cos") + aten.cat.default([-second, first], ...) * Var("sin")


class FuseRotary(PatternRewriter):
    root_layer = (ops.paged_attention,)
    rotation = _rotation()

    def match_and_rewrite(self, layer: Layer) -> Any:
        query, key, *rest = layer.args
        (query, *tables), (key, *others) = (self._undo(tensor) for tensor in (query, key))
        if tables != others:
            raise MatchFailure("query and key are rotated by different angles")
        value, *caches = rest
        return ops.rotary_paged_attention(query, key, value, *map(_rows, tables), *caches)

    def _undo(self, tensor: Tensor) -> tuple[Any, Tensor, Tensor]:
        """x `[T, H, D]`, cos and sin of a rotated tensor."""
        chosen = tensor.parent
        if chosen is None or chosen.op is not aten.select.int or chosen.args[1:] != (0, 0):
            raise MatchFailure(f"{tensor.name} is not the only sequence of a batch")
        rotated = chosen.args[0].parent
        found = None if rotated is None else self.rotation.match(rotated)
        if found is None:
            raise MatchFailure(f"{tensor.name} is not rotated")
        x, cos, sin = found["x"], found["cos"], found["sin"]
        half = x.shape[-1] // 2
        if {found["start"], found["end"], found["first"].output.shape[-1]} != {half} or found["dim"] % 4 != 3:
            raise MatchFailure(f"{tensor.name} is not turned by halves")
        if {cos.shape, sin.shape} != {(1, x.shape[1], 1, x.shape[3])}:
            raise MatchFailure("its angles are not one per token and feature")
        return x.select(0, 0), cos, sin


def _rows(table: Tensor) -> Any:
    return table.reshape((table.shape[1], table.shape[3]))
