"""Registers the kernels for the CUDA dispatch key: compiled regions reach them through the dispatcher, as all do."""

from __future__ import annotations

import torch

from enginery.kernels.triton.linear import linear
from enginery.kernels.triton.paged_attention import paged_attention
from enginery.ops import NAMESPACE

# The registrations live as long as this object.
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register() -> None:
    """To be called once in a process."""
    _LIBRARY.impl("linear", linear, "CUDA")
    _LIBRARY.impl("paged_attention", paged_attention, "CUDA")
