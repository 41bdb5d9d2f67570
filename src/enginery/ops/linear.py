"""Linear layers: over plain weights, and over weights in the layout that a CPU streams at full bandwidth."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare
from enginery.ops.precision import widened

PANEL = 32
"""Outputs of one panel: two AVX-512 registers of float32, the width at which one row of input runs at memory speed."""


def linear_reference(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """input `[..., K]` · weight `[N, K]`ᵀ + bias `[N]` -> `[..., N]`: aten.linear, over weights of 8 bits too.

    With a scale, float32 `[N]` or `[1]`, the weight is float8_e4m3fn and stands for weight · scale. Then the product
    is summed in float32 (float64 for float64) and rounded once, to the input's dtype; and a kernel may round the input
    to float8 before, each row by a scale of its own, max|row| / 448. The reference does not.

    A kernel may read weights while those before it still run: weights are constants of the network, or were written
    earlier than by the step's last kernels.
    """
    if scale is None:
        return torch.nn.functional.linear(input, weight, bias)
    return wide_linear(widened(input), weight, bias, scale).to(input.dtype)


def wide_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """The linear layer in the precision of its input, whatever the others have."""
    product = torch.nn.functional.linear(input, weight.to(input.dtype))
    if scale is not None:
        product = product * scale.to(input.dtype)
    return product if bias is None else product + bias.to(input.dtype)


def _plain_shape(input, weight, bias=None, scale=None):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


LINEAR = declare(
    "linear(Tensor input, Tensor weight, Tensor? bias=None, Tensor? scale=None) -> Tensor",
    reference=linear_reference,
    shape=_plain_shape,
)


def pair_of(dtype: torch.dtype) -> int:
    """Depths that lie side by side in a packed weight."""
    return 2 if dtype == torch.bfloat16 else 1


def pack_reference(weight: torch.Tensor) -> torch.Tensor:
    """weight `[N, K]` -> `[⌈N/32⌉, K, 32, 1]`; bfloat16: `[⌈N/32⌉, ⌈K/2⌉, 32, 2]`, padded with zeros.

    A panel holds 32 rows of the weight, one depth after another. A bfloat16 panel holds pairs of depths side by side,
    so that a 32-bit lane holds two neighbouring depths of one output: the operand of AVX512-BF16's dot product, and two
    shifts away from float32 elsewhere. (float16 has an instruction that widens lanes in order, so it needs no pairs.)
    """
    pair = pair_of(weight.dtype)
    rows, depth = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -depth % pair, 0, -rows % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    """The inverse of `pack`: `[N, K]`."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)[:rows, :depth]


def packed_linear_reference(
    input: torch.Tensor, weight: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """input `[..., K]` · Wᵀ + bias `[N]` -> `[..., N]` with W given as `pack_linear(W)`."""
    return torch.nn.functional.linear(input, unpack(weight, out_features, input.shape[-1]), bias)


def _pack_shape(weight):
    pair = pair_of(weight.dtype)
    return weight.new_empty(-(-weight.shape[0] // PANEL), -(-weight.shape[1] // pair), PANEL, pair)


def _linear_shape(input, weight, out_features, bias=None):
    return input.new_empty(*input.shape[:-1], out_features)


PACK_LINEAR = declare("pack_linear(Tensor weight) -> Tensor", reference=pack_reference, shape=_pack_shape)

PACKED_LINEAR = declare(
    "packed_linear(Tensor input, Tensor weight, int out_features, Tensor? bias=None) -> Tensor",
    reference=packed_linear_reference,
    shape=_linear_shape,
)


def packed_embedding_reference(indices: torch.Tensor, weight: torch.Tensor, features: int) -> torch.Tensor:
    """indices `[...]` int64 -> rows of W `[..., K]`, W given as `pack_linear(W)`: one copy for embedding and head."""
    panels = weight[indices // PANEL, :, indices % PANEL]
    return panels.flatten(-2)[..., :features]


def _embedding_shape(indices, weight, features):
    return weight.new_empty(*indices.shape, features)


PACKED_EMBEDDING = declare(
    "packed_embedding(Tensor indices, Tensor weight, int features) -> Tensor",
    reference=packed_embedding_reference,
    shape=_embedding_shape,
)
