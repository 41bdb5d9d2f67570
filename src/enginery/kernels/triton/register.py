"""Registers the kernels for the CUDA dispatch key: compiled regions reach them through the dispatcher, as all do."""

from __future__ import annotations

import torch

from enginery.kernels.triton.add_rms_norm import add_rms_norm
from enginery.kernels.triton.linear import linear
from enginery.kernels.triton.paged_attention import paged_attention
from enginery.kernels.triton.rotary import rotary_paged_attention
from enginery.kernels.triton.silu_mul import silu_mul
from enginery.ops import NAMESPACE

# The registrations live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register() -> None:
    """To be called once in a process."""
    _LIBRARY.impl("linear", linear, "CUDA")
    _LIBRARY.impl("paged_attention", paged_attention, "CUDA")
    _LIBRARY.impl("rotary_paged_attention", rotary_paged_attention, "CUDA")
    _LIBRARY.impl("add_rms_norm", add_rms_norm, "CUDA")
    _LIBRARY.impl("silu_mul", silu_mul, "CUDA")
