from __future__ import annotations

import contextlib
import gc
import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tests.checkpoint.writing import entry, write_raw

from enginery.checkpoint.safetensors_file import MAX_HEADER_BYTES, map_file, read_header, view
from enginery.errors import CheckpointError, EngineryError, UnsupportedError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dtype.itemsize)
    high = 2 if dtype == torch.bool else 128
    tensors = {
        name: torch.randint(0, high, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator)
        .to(torch.uint8)
        .view(dtype)
        for name, shape in {"m": (3, 5), "odd": (7,), "deep": (2, 1, 2, 3)}.items()
    } | {"empty": torch.empty(0, 4, dtype=dtype), "scalar": torch.ones((), dtype=torch.float32).to(dtype)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    header, mapping = read_header(path), map_file(path)
    assert header.keys() == tensors.keys()
    for name, expected in tensors.items():
        read = view(mapping, header[name])
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_views_are_not_copies_and_never_write_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1 << 22)}, path)
    before, bytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, path.read_bytes()
    tensor = view(map_file(path), read_header(path)["a"])
    gc.collect()
    tensor[0] = 7.0
    assert tensor[0] == 7.0
    assert path.read_bytes() == bytes_before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >= before  # the mapping outlives its owner


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {"b": entry(0, 1, [1], "U8"), "f": entry(1, 9, [2])}
    path = write_raw(tmp_path / "x.safetensors", header, b"\x05" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert view(map_file(path), read_header(path)["f"]).tolist() == [1.5, -2.0]


LIES = {
    "too short": (b"", b"", None, "too few"),
    "header longer than file": ({}, b"", 1 << 63, "claims 9223372036854775808 bytes"),
    "header of one byte": (b"{", b"", 1, "outside"),
    "not JSON": (b"{nonsense}", b"", None, "not valid JSON"),
    "a list": (b"[1, 2]", b"", None, "object is expected"),
    "deep": (b'{"a": [[[[[[[[]]]]]]]]}', b"", None, "nested deeper"),
    "duplicate": (b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {}}', b"x", None, "stands twice"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, None, "'b' overlaps"),
    "same place": ({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8, None, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, None, "'b' leaves a hole of 4"),
    "starts late": ({"a": entry(4, 8)}, b"x" * 8, None, "hole of 4"),
    "past the end": ({"a": entry(0, 400)}, b"x" * 12, None, "tensors end at byte"),
    "bytes left over": ({"a": entry(0, 4)}, b"x" * 12, None, "tensors end at byte"),
    "shape and bytes": ({"a": entry(0, 8, [3])}, b"x" * 8, None, "'a' takes 8 bytes but F32 [3] needs 12"),
    "dtype and bytes": ({"a": entry(0, 8, [2], "F64")}, b"x" * 8, None, "needs 16"),
    "negative shape": ({"a": entry(0, 8, [-2])}, b"x" * 8, None, "impossible shape"),
    "huge shape": ({"a": entry(0, 8, [1 << 40, 1 << 40])}, b"x" * 8, None, "impossible shape"),
    "float shape": ({"a": entry(0, 8, [2.0])}, b"x" * 8, None, "impossible shape"),
    "bool shape": ({"a": entry(0, 4, [True])}, b"x" * 4, None, "impossible shape"),
    "rank": ({"a": entry(0, 4, [1] * 2000)}, b"x" * 4, None, "impossible shape"),
    "backwards": ({"a": entry(8, 4, [1])}, b"x" * 8, None, "impossible offsets"),
    "one offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"x" * 4, None, "impossible offsets"),
    "more keys": ({"a": entry(0, 4) | {"code": "import os"}}, b"x" * 4, None, "must have exactly"),
    "an entry of text": ({"a": "F32"}, b"", None, "must have exactly"),
    "dtype number": ({"a": entry(0, 4, [1], 7)}, b"x" * 4, None, "not a string"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    header, data, length, message = LIES[name]
    path = tmp_path / "x.safetensors"
    if name == "too short":
        path.write_bytes(b"1234")
    else:
        write_raw(path, header, data, length)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4, [1], "Q4_K")}, b"xxxx")
    with pytest.raises(UnsupportedError, match="'a' has dtype 'Q4_K'"):
        read_header(path)


def test_counts_and_sizes_are_bounded_before_parsing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    item = b'"t%07d":{"dtype":"U8","shape":[],"data_offsets":[0,0]},'
    path.write_bytes((27 << 20).to_bytes(8, "little") + b"{" + (item * 540_000)[: (27 << 20) - 1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="tensors in one file"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES * 2)
    with pytest.raises(CheckpointError, match="outside"):
        read_header(path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="'a' is cut"):
        view(map_file(path), header["a"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 60))
def test_mutants_are_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, flips: list, cut: int
) -> None:
    data = bytearray(save({"a": torch.zeros(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"}))
    for place, value in flips:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "mutant.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut]))
    with contextlib.suppress(EngineryError):
        for info in read_header(path).values():
            assert info.offset + info.nbytes <= path.stat().st_size
            view(map_file(path), info)


def test_names_with_odd_characters_survive(tmp_path: Path) -> None:
    names = ["a b", "é", "x" * 300, "../up", "__metadata"]
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path, metadata={"format": "pt", "json": json.dumps(names)})
    assert sorted(read_header(path)) == sorted(names)
