"""f(x)[i] = f(x[i])   for an f that treats each token by itself

Logits are wanted for few tokens of a step. `gather_output` asks for those alone; the rule moves the choice up, before
the head, through operators with one operand that depends on tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from enginery.network import Dim, Layer, Network
from enginery.rewriting.rule import PatternRewriter

aten = torch.ops.aten

INDICES = "logits_indices"
POINTWISE = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.tanh.default, aten.neg.default,
    aten.to.dtype,
)  # fmt: skip


def gather_output(network: Network) -> None:
    """Adds the input logits_indices `[logits]` int64 and makes the output logits `[logits, vocabulary]` float32."""
    logits: Any
    indices: Any = network.add_input(INDICES, (Dim.symbol("logits"),), torch.int64)
    (logits,) = network.outputs
    with network.inserting_before(None, module_path="logits"):
        chosen: Any = torch.index_select(logits, 0, indices)
        network.set_output(network.output_names[0], chosen.to(torch.float32))


class GatherEarlier(PatternRewriter):
    pure = True
    root_layer = (aten.index_select.default,)

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, dim, indices = layer.args
        producer = x.parent
        if producer is None or indices.name != INDICES or len(x.users) != 1:
            return None
        call = producer.op, *producer.args
        match call:
            case aten.linear.default, inner, weight, bias if weight.is_constant and dim < x.rank - 1:
                return torch.nn.functional.linear(torch.index_select(inner, dim, indices), weight, bias)
            case aten.select.int, inner, axis, index:
                axis %= inner.rank
                return torch.index_select(inner, dim + (dim >= axis), indices).select(axis, index)
            case aten.unsqueeze.default, inner, axis if (axis := axis % x.rank) != dim:
                return torch.index_select(inner, dim - (dim > axis), indices).unsqueeze(axis)
            case aten.slice.Tensor, inner, axis, *rest if axis % x.rank != dim:
                return _call(layer, producer.op, torch.index_select(inner, dim, indices), axis, *rest)
        if producer.op in POINTWISE:
            return _through_pointwise(layer, producer, dim, indices)
        return None


def _through_pointwise(layer: Layer, producer: Layer, dim: int, indices: Any) -> Any:
    """One operand has all the tokens; the others have none of that dimension."""
    x = producer.output
    size = x.shape[dim]
    holders = [tensor for tensor in producer.inputs if tensor.rank == x.rank and tensor.shape[dim] == size]
    others = [tensor for tensor in producer.inputs if tensor not in holders]
    if len(holders) != 1 or any(tensor.rank >= x.rank - dim and tensor.shape[dim - x.rank] != 1 for tensor in others):
        return None
    (whole,) = holders
    chosen = _call(layer, aten.index_select.default, whole, dim, indices)
    return _call(layer, producer.op, *(chosen if value is whole else value for value in producer.args))


def _call(layer: Layer, op: Any, *args: Any) -> Any:
    return layer.network.call(op, *args)
