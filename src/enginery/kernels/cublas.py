"""`enginery::float8_linear` by cuBLAS, which multiplies 8-bit floats from compute capability 8.9 on."""

from __future__ import annotations

from functools import partial

import torch

from enginery.ops import NAMESPACE, float8_linear, reference

MULTIPLE = 16
"""of both sides of a weight: what the matrix units take"""

# The registration lives as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register() -> None:
    """To be called once in a process, not while a CUDA graph is captured."""
    _LIBRARY.impl("float8_linear", partial(multiply, unit=torch.ones((), device="cuda")), "CUDA")


def multiply(input: torch.Tensor, weight: torch.Tensor, *, unit: torch.Tensor) -> torch.Tensor:
    """The contract of the op; `unit` is the number 1 in float32: cuBLAS wants scales on the device.

    Sums within a tile are kept in the matrix unit's own precision ("fast accumulation"): less than float32, much more
    than the operands.
    """
    features, depth = weight.shape
    if input.numel() == 0 or features % MULTIPLE or depth % MULTIPLE:
        return reference(float8_linear)(input, weight)
    product = torch._scaled_mm(
        input.reshape(-1, depth), weight.t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.view(*input.shape[:-1], features)
