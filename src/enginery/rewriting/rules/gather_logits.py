"""f(x)[i] = f(x[i])   for an f that treats each token by itself

Logits are wanted for few tokens of a step. `gather_output` asks for those alone; the rules move the choice up, before
the head and the final norm, and then before the last layer's MLP and output projection: to where tokens meet, the last
attention. What only the chosen tokens need is computed for them alone. A value that something else reads too is
computed as it was, and gathered: the residual stream, of which the last attention needs every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from enginery.network import Dim, Layer, Network, Tensor
from enginery.rewriting.expectations import block_of
from enginery.rewriting.isolation import TOKENS, keeps_tokens_apart
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten

INDICES = "logits_indices"
RESHAPES = ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as")


def gather_output(network: Network) -> None:
    """Adds the input logits_indices `[logits]` int64 and makes the output logits `[logits, vocabulary]`."""
    logits: Any
    indices: Any = network.add_input(INDICES, (Dim.symbol("logits"),), torch.int64)
    (logits,) = network.outputs
    with network.inserting_before(None, module_path="logits"):
        chosen: Any = torch.index_select(logits, 0, indices)
        network.set_output(network.output_names[0], chosen)


class GatherEarlier(PatternRewriter):
    """f(x)[i] = f(x[i]) for an f that treats each token by itself and belongs to no repeated layer"""

    pure = True
    root_layer = (aten.index_select.default,)
    into_layers = False

    def match_and_rewrite(self, layer: Layer) -> Any:
        x, dim, indices = layer.args
        if indices.name != INDICES or _rows(x) != Rows(dim % x.rank, 1):
            return None
        tail = self._tail(layer)
        if all(moved.op._opname in RESHAPES for moved in tail):
            raise MatchFailure(f"{x.name} is read elsewhere too, or tokens meet in it")
        return _for_chosen_tokens(layer, tail)

    def _tail(self, gather: Layer) -> list[Layer]:
        """The layers that can be computed for the gathered tokens alone, in execution order."""
        tail: dict[Layer, None] = {gather: None}
        pending = _sources(gather)
        while pending:
            layer = max(pending, key=lambda layer: layer.order)  # those that read it have been looked at
            pending.remove(layer)
            reachable = self.into_layers or not block_of(layer.module_path)
            if reachable and all(user in tail for user in layer.users) and _treats_tokens_alike(layer):
                tail[layer] = None
                pending |= _sources(layer)
        return list(tail)[:0:-1]


class GatherInLastLayer(GatherEarlier):
    """f(x)[i] = f(x[i]) for the f between the last attention and the head

    The last layer is then unlike the others, and compiled for itself.
    """

    benefit = 1  # first: it takes what the other would take, and in one piece
    into_layers = True


class Rows(NamedTuple):
    """Where a value has its tokens: `per_token` rows for each along an axis, those of one token side by side."""

    axis: int
    per_token: int


def _rows(tensor: Tensor) -> Rows | None:
    """None: it does not depend on the number of tokens. Raises MatchFailure if it does in another way."""
    axes = [axis for axis, size in enumerate(tensor.shape) if isinstance(size, Dim) and TOKENS in size.symbols]
    if not axes:
        return None
    tokens, size = Dim.symbol(TOKENS), tensor.shape[axes[0]]
    count: Any = size // tokens
    if len(axes) > 1 or not isinstance(count, int) or tokens * count != size:
        raise MatchFailure(f"{tensor.name} has no axis of tokens")
    return Rows(axes[0], count)


def _sources(layer: Layer) -> set[Layer]:
    return {tensor.parent for tensor in layer.inputs if tensor.parent is not None}


def _treats_tokens_alike(layer: Layer) -> bool:
    """Its results for some tokens follow from its operands for these tokens, by the same call."""
    if layer.has_effects or layer.is_constant or any(output.is_output for output in layer.outputs):
        return False
    if any(isinstance(value, Dim) and TOKENS in value.symbols for value in layer.args):
        return False  # it computes with the number of tokens; in a list of sizes it is one
    try:
        operands, results = ([_rows(tensor) for tensor in tensors] for tensors in (layer.inputs, layer.outputs))
    except MatchFailure:
        return False
    if not all(results) or not keeps_tokens_apart(layer):
        return False
    if layer.op._opname in RESHAPES:
        return _before_rows(layer.inputs[0]) == _before_rows(layer.output)
    return len({rows.per_token for rows in (*operands, *results) if rows is not None}) == 1


def _before_rows(tensor: Tensor) -> Any:
    """How often the tokens stand in it, one after the other: what a reshape that keeps their order leaves."""
    rows = _rows(tensor)
    return None if rows is None else math.prod(tensor.shape[: rows.axis])


def _for_chosen_tokens(gather: Layer, tail: Sequence[Layer]) -> Tensor:
    """The same calls over gathered operands, each in its own module."""
    network, (x, _, indices) = gather.network, gather.args
    twins: dict[Tensor, Tensor] = {}

    def twin(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value not in twins:
                twins[value] = _gathered(value, indices)
            return twins[value]
        if isinstance(value, tuple):
            return tuple(map(twin, value))
        return value.substitute({TOKENS: indices.shape[0]}) if isinstance(value, Dim) else value

    for layer in tail:
        with network.inserting_before(gather, module_path=layer.module_path):
            outputs = network.add_layer(layer.op, tuple(map(twin, layer.args))).outputs
        twins.update(zip(layer.outputs, outputs, strict=True))
    return twins[x]


def _gathered(tensor: Any, indices: Any) -> Any:
    """Raises MatchFailure if it depends on tokens, but not by rows."""
    rows = _rows(tensor)
    if rows is None:
        return tensor
    if rows.per_token == 1:
        return torch.index_select(tensor, rows.axis, indices)
    before, after = tensor.shape[: rows.axis], tensor.shape[rows.axis + 1 :]
    by_token = tensor.reshape([*before, Dim.symbol(TOKENS), rows.per_token, *after])
    gathered = torch.index_select(by_token, rows.axis, indices)
    return gathered.reshape([*before, indices.shape[0] * rows.per_token, *after])
