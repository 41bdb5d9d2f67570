"""The closed op set of Enginery, beside ATen. Each op is declared once: schema, eager reference, shape rule."""

from __future__ import annotations

from collections.abc import Callable

import torch

from enginery.ops.add_rms_norm import ADD_RMS_NORM
from enginery.ops.attention import ATTENTION
from enginery.ops.declare import NAMESPACE, Op
from enginery.ops.experts import EXPERT_LINEAR
from enginery.ops.gpt_attention import GPT_ATTENTION
from enginery.ops.greatest import GREATEST
from enginery.ops.linear import LINEAR, PACK_LINEAR, PACKED_EMBEDDING, PACKED_LINEAR, PANEL
from enginery.ops.norm_linear import NORM_LINEAR
from enginery.ops.paged_attention import PAGED_ATTENTION
from enginery.ops.rotary_paged_attention import ROTARY_PAGED_ATTENTION
from enginery.ops.silu_mul import SILU_MUL

OPS: tuple[Op, ...] = (
    ATTENTION,
    PAGED_ATTENTION,
    PACK_LINEAR,
    PACKED_LINEAR,
    PACKED_EMBEDDING,
    EXPERT_LINEAR,
    GPT_ATTENTION,
    ADD_RMS_NORM,
    SILU_MUL,
    ROTARY_PAGED_ATTENTION,
    LINEAR,
    NORM_LINEAR,
    GREATEST,
)

attention = ATTENTION.overload
paged_attention = PAGED_ATTENTION.overload
pack_linear = PACK_LINEAR.overload
packed_linear = PACKED_LINEAR.overload
packed_embedding = PACKED_EMBEDDING.overload
expert_linear = EXPERT_LINEAR.overload
gpt_attention = GPT_ATTENTION.overload
add_rms_norm = ADD_RMS_NORM.overload
silu_mul = SILU_MUL.overload
rotary_paged_attention = ROTARY_PAGED_ATTENTION.overload
linear = LINEAR.overload
norm_linear = NORM_LINEAR.overload
greatest = GREATEST.overload


def reference(overload: torch._ops.OpOverload) -> Callable:
    """The oracle of one of our ops; any other operator is its own."""
    return next((op.reference for op in OPS if op.overload is overload), overload)


__all__ = [
    "NAMESPACE", "OPS", "PANEL", "Op", "add_rms_norm", "attention", "expert_linear", "gpt_attention", "greatest",
    "linear", "norm_linear", "pack_linear", "packed_embedding", "packed_linear", "paged_attention", "reference",
    "rotary_paged_attention", "silu_mul",
]  # fmt: skip
