"""Packing of host arrays, which a device unpacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from enginery.runtime.transfers import Download, pack, unpack, upload

ARRAYS = [
    np.arange(5),
    np.array([1.5], np.float32),
    np.zeros(0, np.int64),
    np.array([[True, False, True]]),
    np.linspace(0, 1, 7)[::2],
    np.arange(12, dtype=np.int32).reshape(3, 4).T,
]


def test_what_is_packed_is_unpacked() -> None:
    for array, tensor in zip(ARRAYS, unpack(pack(ARRAYS, pinned=False), ARRAYS), strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_upload_and_download_on_a_cpu() -> None:
    sets = upload([{"a": ARRAYS[0]}, {}, {"a": ARRAYS[1], "b": ARRAYS[4]}], torch.device("cpu"))
    assert [list(each) for each in sets] == [["a"], [], ["a", "b"]]
    found = Download([sets[0]["a"], sets[2]["b"]]).wait()
    np.testing.assert_array_equal(found[0], ARRAYS[0])
    np.testing.assert_array_equal(found[1], ARRAYS[4])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_download_is_pinned_and_waits_for_the_device() -> None:
    first, second = torch.randn(4, 6), torch.arange(3)
    tensors = [first.cuda()[:, 1:3], second.cuda(), torch.zeros(2, 0).cuda()]
    torch.cuda._sleep(50_000_000)
    download = Download([tensor + 1 for tensor in tensors])
    assert all(tensor.is_pinned() for tensor in download._tensors[:2])
    for found, expected in zip(download.wait(), (first[:, 1:3] + 1, second + 1, torch.zeros(2, 0)), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
