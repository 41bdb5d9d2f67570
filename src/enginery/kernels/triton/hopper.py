"""The kernels for Hopper GPUs that are written in Gluon, Triton's lower language; None where they are not to be had.

Gluon is experimental: what was tested with one version of Triton may not compile with the next, or be slow.
"""

from __future__ import annotations

import triton

if triton.__version__.startswith("3.6."):
    from enginery.kernels.triton import hopper_decode, hopper_gated, hopper_prompts, hopper_row
else:
    hopper_decode = hopper_gated = hopper_prompts = hopper_row = None  # type: ignore[assignment]

__all__ = ["hopper_decode", "hopper_gated", "hopper_prompts", "hopper_row"]
