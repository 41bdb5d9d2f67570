"""The GPU's kernel for the greatest of rows, to the bit: on a GPU, else in Triton's interpreter, over small tiles."""

from __future__ import annotations

import math

import pytest
import torch

from enginery.ops.greatest import greatest_reference

from .triton_device import DEVICE, check_replays, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton.greatest import MOST_TILES, greatest
    from enginery.kernels.triton.paged_attention import new_arrivals


def check(logits: torch.Tensor, **options) -> None:
    for found, expected in zip(greatest(logits, **options), greatest_reference(logits), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def rows_of_all_kinds(width: int, values: int) -> torch.Tensor:
    """Whole numbers below `values`, so that many are equal, between others that are not finite."""
    logits = torch.randint(-values, values, (10, width)).float()
    columns = torch.randint(width, (10, 3))
    logits[1, columns[1]] = math.nan
    logits[2, columns[2]] = -torch.tensor(math.nan)
    logits[3, columns[3]] = math.inf
    logits[4, columns[4, 0]], logits[4, columns[4, 1]] = math.inf, math.nan
    logits[5], logits[6], logits[7, -1] = -math.inf, 7.0, 1e4
    logits[8] = torch.where(torch.rand(width) < 0.5, -0.0, 0.0)
    return logits.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "tile"), [(1, 16), (64, 64), (257, 32), (300, 128)])
def test_the_first_of_the_greatest(width: int, tile: int, dtype: torch.dtype) -> None:
    check(rows_of_all_kinds(width, 3).to(dtype), tile=tile)
    check(torch.randn(3, width, device=DEVICE).to(dtype), tile=tile)


def test_rows_apart_and_columns_apart() -> None:
    logits = torch.randn(6, 400, device=DEVICE)
    check(logits[::2, 100:300], tile=64)
    check(logits[:, ::2], tile=64)


def test_a_row_of_too_many_tiles_has_larger_ones() -> None:
    check(torch.randn(2, 2 * MOST_TILES + 1, device=DEVICE), tile=2)


def test_counters_are_zero_again() -> None:
    arrivals = new_arrivals(DEVICE)
    for rows in (5, 2, 7):
        check(torch.randn(rows, 200, device=DEVICE), arrivals=arrivals, tile=64)
        assert not arrivals.any()
    check(torch.randn(4, 100, device=DEVICE), arrivals=arrivals[:3], tile=64)  # too few


def test_float64_keeps_its_precision() -> None:
    logits = torch.ones(2, 40, device=DEVICE, dtype=torch.float64)
    logits[:, 7] += 1e-12
    check(logits)


def test_no_rows() -> None:
    assert [each.shape for each in greatest(torch.empty(0, 30, device=DEVICE))] == [(0,), (0,)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 32, 300])
@pytest.mark.parametrize("width", [32000, 50257, 128256, 262144, 2_000_001])
def test_vocabularies(width: int, rows: int, dtype: torch.dtype) -> None:
    check(torch.randn(min(rows, 2**26 // width), width, device=DEVICE).to(dtype))
    check(rows_of_all_kinds(width, 50).to(dtype))


@pytest.mark.gpu
def test_graphs_hold_it() -> None:
    logits, arrivals = torch.randn(64, 128256, device=DEVICE), new_arrivals(DEVICE)
    check_replays(lambda: greatest(logits, arrivals=arrivals)[1], logits.normal_, times=50)
