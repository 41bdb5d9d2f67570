"""Registers the kernels for the CUDA dispatch key: compiled regions reach them through the dispatcher, as all do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from enginery.kernels.triton.add_rms_norm import add_rms_norm
from enginery.kernels.triton.cublas import Cublas
from enginery.kernels.triton.fused_linear import linear, norm_linear
from enginery.kernels.triton.greatest import greatest
from enginery.kernels.triton.paged_attention import new_arrivals, paged_attention
from enginery.kernels.triton.rotary import rotary_paged_attention
from enginery.kernels.triton.silu_mul import silu_mul
from enginery.ops import NAMESPACE
from enginery.ops.raised import keeping

# The registrations live as long as these objects.
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")
_CUBLAS = Cublas()


def register() -> None:
    """To be called once in a process, not while a CUDA graph is captured."""
    device = torch.device("cuda", torch.cuda.current_device())
    arrivals = new_arrivals(device)
    _CUBLAS.open(device)
    kernels: dict[str, Callable] = {
        "linear": partial(linear, cublas=_CUBLAS),
        "norm_linear": partial(norm_linear, cublas=_CUBLAS),
        "paged_attention": partial(paged_attention, arrivals=arrivals),
        "rotary_paged_attention": partial(rotary_paged_attention, arrivals=arrivals),
        "greatest": partial(greatest, arrivals=arrivals),
        "add_rms_norm": add_rms_norm,
        "silu_mul": silu_mul,
    }
    for name, kernel in kernels.items():
        _LIBRARY.impl(name, keeping(kernel), "CUDA")


def measuring() -> AbstractContextManager[None]:
    """Within, products of cuBLAS are measured when they are first met."""
    return _CUBLAS.measuring()
