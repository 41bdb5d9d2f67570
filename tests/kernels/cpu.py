"""The CPU kernels under test: those of this machine, or the library in KERNELS_UNDER_TEST (see test_cpu_targets.py)."""

from __future__ import annotations

import os

import pytest
import torch

from enginery.kernels.table import TABLE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
"""Of relative errors: accumulation in float32, then one rounding to the dtype of the output."""


def require_kernels() -> None:
    library = os.environ.get("KERNELS_UNDER_TEST")
    if library:
        torch.ops.load_library(library)
    missing = [row for row in TABLE.load("cpu") if row.op == "packed_linear" and row.kernel == "reference"]
    if missing:
        pytest.skip(missing[0].reason)


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.double() - expected).norm() / expected.norm().clamp_min(1e-300))
