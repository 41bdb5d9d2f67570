"""The promise behind batching: tokens of a step meet in attention only, where block tables keep sequences apart.

A step packs tokens of many sequences into one dimension. Whatever else combines along that dimension (a convolution, a
recurrence, a mask of its own) would mix sequences, so a network that has it is refused, by the name of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch

from enginery.errors import UnsupportedError
from enginery.network import Dim, Layer, Network, Tensor, operator_name

TOKENS = "tokens"

Axes = Iterable[tuple[Tensor, int]]
"""tensors and the dimensions along which a call combines, picks or reorders their elements"""


def check_tokens_apart(network: Network) -> None:
    """Raises UnsupportedError naming the first layer that combines, or may combine, tokens outside attention."""
    for layer in network:
        if any(_token_axes(tensor) for tensor in (*layer.inputs, *layer.outputs)):
            _check(layer)


def keeps_tokens_apart(layer: Layer) -> bool:
    """No output of the layer for one token depends on its operands for another, by the axes that it works along."""
    try:
        _check(layer)
    except UnsupportedError:
        return False
    return True


def _check(layer: Layer) -> None:
    name = operator_name(layer.op)
    axes_of = None if layer.op in _BINARY else _AXES.get(layer.op._opname)
    if axes_of is None and torch.Tag.pointwise not in layer.op.tags and layer.op not in _BINARY:
        raise UnsupportedError(f"layer {layer.name} ({name}) is not known to keep tokens apart", _FIX)
    for tensor, axis in () if axes_of is None else axes_of(layer):
        if axis % max(tensor.rank, 1) in _token_axes(tensor) and not _is_wanted(layer):
            raise UnsupportedError(f"layer {layer.name} ({name}) combines different tokens of a step", _FIX)
    for output in layer.outputs:
        if len(_token_axes(output)) > 1:
            raise UnsupportedError(f"layer {layer.name} ({name}) relates every token to every other", _FIX)


_FIX = "Only attention may do that; see `enginery explain` for attention that was not recognised"


def _is_wanted(layer: Layer) -> bool:
    """The choice of the tokens whose logits are asked for."""
    return layer.op is torch.ops.aten.index_select.default and layer.args[2].is_input


def _token_axes(tensor: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(tensor.shape) if isinstance(size, Dim) and TOKENS in size.symbols}


def _none(layer: Layer) -> Axes:
    return ()


def _all(layer: Layer) -> Axes:
    return [(tensor, axis) for tensor in layer.inputs for axis in range(tensor.rank)]


def _dim(layer: Layer) -> Axes:
    """Of the arguments `dim` or `dims`; without one, all."""
    arguments = layer.arguments
    dims = arguments.get("dim", arguments.get("dims"))
    if dims is None:
        return _all(layer)
    dims = dims if isinstance(dims, tuple) else (dims,)
    return [(tensor, dim) for tensor in layer.inputs[:1] if tensor.rank for dim in dims]


def _joined(layer: Layer) -> Axes:
    return [(tensor, layer.arguments["dim"]) for tensor in layer.inputs]


def _looked_up(layer: Layer) -> Axes:
    return [(layer.args[0], 0)]


def _last(layer: Layer) -> Axes:
    return [(layer.inputs[0], -1)]


def _normalised(layer: Layer) -> Axes:
    return [(layer.inputs[0], -1 - i) for i in range(len(layer.arguments["normalized_shape"]))]


def _product(layer: Layer) -> Axes:
    one, other = layer.inputs[-2:]
    return [(one, -1), (other, -2 if other.rank > 1 else -1)]


def _indexed(layer: Layer) -> Axes:
    return [(layer.args[0], axis) for axis, index in enumerate(layer.args[1]) if index is not None]


def _einsum(layer: Layer) -> Iterator[tuple[Tensor, int]]:
    terms, _, kept = layer.args[0].replace(" ", "").partition("->")
    for letters, tensor in zip(terms.split(","), layer.args[1], strict=True):
        for axis, letter in enumerate(letters):
            if "." in letters or letter not in kept:
                yield tensor, axis


def _counted(layer: Layer) -> Axes:
    """A count over the tokens of a step is no position in a sequence."""
    raise UnsupportedError(f"layer {layer.name} counts the tokens of a step instead of reading their positions", _FIX)


def _table() -> Mapping[str, Callable[[Layer], Axes]]:
    """By operator name, without overload. Pointwise operators need no entry."""
    groups: dict[Callable[[Layer], Axes], str] = {
        _none: "reshape view _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t numpy_T mT expand "
        "repeat broadcast_to expand_as view_as to type_as _to_copy clone contiguous alias detach dropout stack where "
        "copy zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
        "scalar_tensor packed_embedding one_hot paged_attention rotary_paged_attention "
        "pack_linear masked_fill bitwise_not",
        _dim: "sum mean prod amax amin max min argmax argmin any all softmax _softmax log_softmax logsumexp cumsum "
        "cumprod topk sort argsort split split_with_sizes chunk unbind gather scatter scatter_add index_select "
        "index_add select slice slice_scatter select_scatter repeat_interleave narrow flip roll var std norm "
        "linalg_vector_norm diff glu",
        _looked_up: "embedding",
        _joined: "cat concat concatenate hstack",
        _last: "linear packed_linear expert_linear norm_linear add_rms_norm silu_mul greatest",
        _normalised: "layer_norm rms_norm native_layer_norm",
        _product: "matmul mm bmm addmm baddbmm mv dot",
        _indexed: "index index_put",
        _einsum: "einsum",
        _counted: "arange",
        _all: "attention triu tril",
    }
    return MappingProxyType({name: rule for rule, names in groups.items() for name in names.split()})


_AXES = _table()
_BINARY = (torch.ops.aten.min.other, torch.ops.aten.max.other)
"""pointwise, unlike the reductions of their name"""

__all__ = ["TOKENS", "check_tokens_apart", "keeps_tokens_apart"]
