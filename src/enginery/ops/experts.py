"""Linear layers of a mixture of experts: each row goes through the weight of its own expert."""

from __future__ import annotations

import torch

from enginery.ops.declare import declare


def expert_linear_reference(
    input: torch.Tensor,
    weight: torch.Tensor,
    experts: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """input `[S, K]`, weight `[E, N, K]` (transposed: `[E, K, N]`), experts `[S]` int64, bias `[E, N]` -> `[S, N]`."""
    rows = weight.shape[2] if transposed else weight.shape[1]
    output = input.new_empty(input.shape[0], rows)
    for expert in experts.unique().tolist():
        chosen = (experts == expert).nonzero()[:, 0]
        matrix = weight[expert].T if transposed else weight[expert]
        offset = None if bias is None else bias[expert]
        output[chosen] = torch.nn.functional.linear(input[chosen], matrix, offset)
    return output


def _shape(input, weight, experts, bias=None, transposed=False):
    return input.new_empty(input.shape[0], weight.shape[2] if transposed else weight.shape[1])


EXPERT_LINEAR = declare(
    "expert_linear(Tensor input, Tensor weight, Tensor experts, Tensor? bias=None, bool transposed=False) -> Tensor",
    reference=expert_linear_reference,
    shape=_shape,
)
