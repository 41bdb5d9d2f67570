"""softmax(f(q·kᵀ))·v = attention(q, k, v, scale, window, slopes)   where f(s) = scale·s + slope·j, −∞ outside the mask

Models that spell their attention out build f in many ways: masks of comparisons or tables, biases added before or after
the scale, in one step or five. So f is not matched but measured: whatever lies between the product and the softmax
depends on nothing but positions, and is run on a short sequence, once with zeros and once with random numbers for q·kᵀ.
What comes out is compared, element by element, with a causal mask, a window, ALiBi's linear bias (Press et al., ICLR
2022) and a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from enginery import ops
from enginery.network import Layer, Program, Tensor
from enginery.rewriting.rule import MatchFailure, PatternRewriter

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
ORDER_KEEPING = (aten.reshape.default, aten.to.dtype, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)
SHORTEST, LONGEST = 17, 1024
"""tokens of the sequence on which f is measured: longer than any window that its literals may spell, up to a limit"""
NOISE = 64.0
"""size of the random products: large enough that a soft cap bends them"""
MASKED = -1e4
"""scores below this are masked: models write −10⁴, the least float, or −∞"""


class Measured(NamedTuple):
    scale: float
    window: int | None
    slopes: torch.Tensor | None


class RecogniseAttention(PatternRewriter):
    pure = True
    root_layer = (*PRODUCTS, aten.scaled_dot_product_attention.default)

    def match_and_rewrite(self, layer: Layer) -> Any:
        if layer.op is aten.scaled_dot_product_attention.default:
            query, key, value = layer.args[:3]
            measured = _measure_mask(layer)
        else:
            weights, value = layer.args
            softmax = _through(weights, ORDER_KEEPING)
            if softmax is None or softmax.op is not aten.softmax.int:
                return None
            product = _only_product(softmax.inputs[0])
            query, key = product.args[0], product.args[1].transpose(-1, -2)
            measured = _measure(softmax.inputs[0], product.output)
        rows: list[Any] = [_token_major(tensor.to(value.dtype)) for tensor in (query, key, value)]
        result = _attention(layer, rows, measured).transpose(0, 1)
        return result.reshape(layer.output.shape).to(layer.output.dtype)


def _attention(layer: Layer, rows: list[Any], measured: Measured) -> Any:
    slopes: Any = measured.slopes
    if slopes is not None:
        slopes = layer.network.add_constant(f"{layer.name}.alibi_slopes", tuple(slopes.shape), slopes.dtype, slopes)
    return ops.attention(*rows, measured.scale, True, measured.window, None, None, slopes)


def _token_major(x: Any) -> Any:
    """`[1, H, T, D]` or `[H, T, D]` -> `[T, H, D]`."""
    if x.rank == 4 and x.shape[0] == 1:
        x = x.select(0, 0)
    if x.rank != 3:
        raise MatchFailure(f"{x.name} has not the shape [1, heads, tokens, size]")
    return x.transpose(0, 1)


def _through(tensor: Tensor, transparent: tuple[Any, ...]) -> Layer | None:
    layer = tensor.parent
    while layer is not None and layer.op in transparent:
        layer = layer.inputs[0].parent
    return layer


def _only_product(scores: Tensor) -> Layer:
    """The product of queries and keys among the ancestors of the scores; the others depend on positions alone."""
    products = [layer for layer in _ancestors([scores], stop=PRODUCTS) if layer.op in PRODUCTS]
    if len(products) != 1:
        raise MatchFailure(f"the scores come from {len(products)} products")
    return products[0]


def _ancestors(tensors: Iterable[Tensor], stop: tuple[Any, ...] = ()) -> list[Layer]:
    """The layers that compute the tensors, in execution order; behind a layer of `stop` the search ends."""
    found: set[Layer] = set()
    pending = [tensor.parent for tensor in tensors]
    while pending:
        layer = pending.pop()
        if layer is not None and layer not in found:
            found.add(layer)
            if layer.op not in stop:
                pending.extend(tensor.parent for tensor in layer.inputs)
    return sorted(found, key=lambda layer: layer.order)


def _measure(scores: Tensor, product: Tensor) -> Measured:
    layers = [layer for layer in _ancestors([scores], stop=PRODUCTS) if layer is not product.parent]
    length = _length(layers, scores)
    heads = product.shape[-3]
    shape = [size if isinstance(size, int) else length for size in product.shape]
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(shape, generator=generator).to(product.dtype)
    bias, mixed = (_run(layers, scores, length, {product: given}) for given in (torch.zeros_like(noise), noise))
    bias, mixed, noise = (_per_head(tensor, heads, length) for tensor in (bias, mixed, noise))
    seen = bias > MASKED
    scale = _scale(scores, product)
    exactness = _exactness(layers, scores)
    if not (mixed - bias - scale * noise)[seen].abs().max() <= exactness * mixed[seen].abs().max():
        raise MatchFailure("the scores are no scaled product plus a bias")
    return Measured(scale, *_shape_of(bias, seen, exactness))


def _measure_mask(layer: Layer) -> Measured:
    query, _, _, mask, dropout, causal, scale, _ = layer.args
    heads, size = query.shape[-3], query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if dropout:
        raise MatchFailure("it drops weights at random")
    if mask is None:
        if not causal:
            raise MatchFailure("it is not causal")
        return Measured(scale, None, None)
    layers = _ancestors([mask], stop=PRODUCTS)
    length = _length(layers, mask)
    bias = _run(layers, mask, length, {})
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
    bias = _per_head(bias, heads, length)
    return Measured(scale, *_shape_of(bias, bias > MASKED, _exactness(layers, mask)))


def _shape_of(bias: torch.Tensor, seen: torch.Tensor, tolerance: float) -> tuple[int | None, torch.Tensor | None]:
    """The window and the slopes of a bias `[H, T, T]` of which `seen` are not masked."""
    length = bias.shape[-1]
    place = torch.arange(length, dtype=torch.float64)
    distance = place[None, :] - place[:, None]
    width = int(seen[0, -1].sum())
    if not torch.equal(seen, ((distance <= 0) & (distance > -width)).expand_as(seen)):
        raise MatchFailure("the mask is neither causal nor a causal window")
    last, keys = bias[:, -1, length - width :], place[length - width :]
    centred = keys - keys.mean()
    slopes = (last @ centred) / max(float(centred @ centred), 1.0)
    line = slopes[:, None, None] * distance
    offset = bias.diagonal(dim1=-2, dim2=-1)[..., None]
    if not (bias - offset - line)[seen].abs().max() <= tolerance * max(1.0, float(bias[seen].abs().max())):
        raise MatchFailure("the bias is not linear in the distance")
    window = width if width < length else None
    return window, slopes.float() if slopes.abs().max() > 1e-7 else None


def _scale(scores: Tensor, product: Tensor) -> float:
    """The product of the numbers that the scores are multiplied with on their way to the softmax."""
    scale, tensor = 1.0, scores
    while tensor is not product:
        layer = tensor.parent
        following = [x for x in layer.inputs if x is product or product.parent in _ancestors([x])] if layer else []
        if layer is None or len(following) != 1:
            raise MatchFailure("the scores have no single way to the softmax")
        if layer.op in (aten.mul.Tensor, aten.div.Tensor):
            one, other = layer.args[:2]
            if one is not following[0] and layer.op is aten.mul.Tensor:
                other = one
            if isinstance(other, (int, float)):  # a factor that is a tensor may be a mask of ones and zeros: measured
                scale = scale * other if layer.op is aten.mul.Tensor else scale / other
        tensor = following[0]
    return scale


def _length(layers: list[Layer], result: Tensor) -> int:
    """Tokens to measure on: longer than every window that a literal of the layers may be."""
    literals = [value for layer in layers for value in _numbers(layer.args) if abs(value) <= LONGEST]
    wanted = max(SHORTEST, *(int(abs(value)) + 2 for value in literals)) if literals else SHORTEST
    bounds = [bound for _, bound in result.network.ranges.values() if bound is not None]
    return min(wanted, *bounds) if bounds else wanted


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield value


def _exactness(layers: list[Layer], result: Tensor) -> float:
    """Tolerance for values that went through the coarsest dtype among the layers."""
    dtypes = [output.dtype for layer in layers for output in layer.outputs] + [result.dtype]
    return max((8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=1e-6)


def _run(layers: list[Layer], result: Tensor, length: int, given: dict[Tensor, torch.Tensor]) -> torch.Tensor:
    """The result for one sequence of that length, with values given for some tensors."""
    feeds = dict(given)
    for layer in layers:
        for tensor in layer.inputs:
            if tensor.parent is None and tensor not in feeds:
                feeds[tensor] = _leaf(tensor, length)
    symbols = {"tokens": length}
    if result in feeds:
        return feeds[result]
    (value,) = Program(layers, list(feeds), [result])(list(feeds.values()), symbols, torch.device("cpu"))
    return value


def _leaf(tensor: Tensor, length: int) -> torch.Tensor:
    network = tensor.network
    if tensor.is_constant and tensor.name in network.values:
        return network.values[tensor.name]
    if tensor.name == "positions":
        return torch.arange(length)
    raise MatchFailure(f"the mask depends on {tensor.name}")


def _per_head(tensor: torch.Tensor, heads: Any, length: int) -> torch.Tensor:
    """`[…, T, T]` -> `[H, T, T]` in float64."""
    while tensor.dim() < 3:
        tensor = tensor[None]
    return tensor.double().reshape(-1, *tensor.shape[-2:]).expand(heads, length, length)
