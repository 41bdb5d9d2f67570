"""Packing of host arrays, which a device unpacks."""

from __future__ import annotations

import numpy as np
import torch

from enginery.runtime.transfers import Download, join, pack, split, unpack, upload

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


def test_what_is_joined_is_split() -> None:
    tensors = [torch.arange(3), torch.randn(1), torch.randn(4, 6)[:, 1:3], torch.zeros(2, 0), torch.randn(5)]
    for array, tensor in zip(split(join(tensors), tensors), tensors, strict=True):
        assert (array.dtype, array.shape) == (tensor.numpy().dtype, tensor.shape)
        np.testing.assert_array_equal(array, tensor.numpy())


def test_upload_and_download_on_a_cpu() -> None:
    sets = upload([{"a": ARRAYS[0]}, {}, {"a": ARRAYS[1], "b": ARRAYS[4]}], torch.device("cpu"))
    assert [list(each) for each in sets] == [["a"], [], ["a", "b"]]
    found = Download([sets[0]["a"], sets[2]["b"]]).wait()
    np.testing.assert_array_equal(found[0], ARRAYS[0])
    np.testing.assert_array_equal(found[1], ARRAYS[4])
