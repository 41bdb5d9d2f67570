"""The greatest of rows: what the reference promises beyond torch's own maximum, and its shape without data."""

from __future__ import annotations

import math

import pytest
import torch

from enginery import ops
from enginery.network import Network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_first_of_equals_and_the_first_nan(dtype: torch.dtype) -> None:
    rows = [[1, 3, 3, 2], [-math.inf] * 4, [1, math.nan, math.inf, math.nan], [-0.0, 0.0, -1, -2], [5, math.inf, 5, 5]]
    best, columns = ops.greatest(torch.tensor(rows, dtype=dtype))
    assert columns.tolist() == [1, 0, 1, 0, 1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.tensor([3, -math.inf, math.nan, 0, math.inf], dtype=wide)
    torch.testing.assert_close(best, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_shapes_without_data(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 7).to(dtype)
    torch.library.opcheck(ops.greatest, (logits,), test_utils=("test_schema", "test_faketensor"))
    outputs = ops.greatest(Network().add_input("logits", (3, 7), dtype))
    assert [(each.shape, each.dtype) for each in outputs] == [(each.shape, each.dtype) for each in ops.greatest(logits)]
