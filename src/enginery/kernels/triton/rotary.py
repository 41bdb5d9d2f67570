"""`enginery::rotary_paged_attention` on NVIDIA GPUs: the kernels of paged attention turn what they read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from enginery.kernels.triton.paged_attention import paged_attention


def rotary_paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `enginery::rotary_paged_attention`, in 16 and 32 bits; `arrivals` as in `paged_attention`."""
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return partial(paged_attention, angles=(cos, sin), arrivals=arrivals)(query, key, value, *rest)
