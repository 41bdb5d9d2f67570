"""Launches that overlap (programmatic dependent launch, from compute capability 9.0 on).

A decoding step is hundreds of kernels of a few microseconds, and each leaves the memory idle while its first programs
start and its last ones end. So a kernel may start before the one ahead of it has ended, and waits for that end
(`gdc_wait`) when its programs are in place. Two things follow.

- A short kernel lets its successor start at once (`gdc_launch_dependents`). A product does not: programs that come in
  beside the last ones of a long kernel crowd where room is first, and the others wait for them (136 instead of 125 µs
  for a layer of 8 rows on an H200). The one of `hopper_gated.py`, whose programs all run at once, does so behind its
  last loads; that of `hopper_row.py`, whose programs leave little room beside them, when it starts.
- While a product waits, it asks the L2 cache for the beginning of its weights: a hint, which cannot read what has yet
  to be written.

Every program of a kernel that is launched so must wait: its end tells the next kernel that all earlier ones ended.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from enginery.kernels.triton.gpu import Gpu

LINE = tl.constexpr(128)
"""Bytes of a request to the L2 cache."""


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Of a short kernel, before it reads or writes anything."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_with_weights(weight, rows, DEPTH: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr):
    """Of a product with the `rows` of a weight `[features, DEPTH]`: their first AHEAD bytes come to the L2 cache."""
    if OVERLAP:
        SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        if AHEAD >= LINE:
            lines = tl.arange(0, AHEAD // LINE) * (LINE // SIZE)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                [weight + rows.to(tl.int64)[:, None] * DEPTH + lines[None, :]],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        gdc_wait()


def launch_options(device: torch.device) -> dict[str, Any]:
    """Of a launch of a kernel that has OVERLAP."""
    overlap = Gpu.of(device).overlaps
    return {"OVERLAP": overlap, "launch_pdl": overlap}
