"""The safetensors container, read by its specification and nothing more.

    u64 little-endian N | N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} | tensor bytes

Offsets are relative to the end of the header; tensors lie side by side without holes or overlaps and end with the file.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginery.checkpoint.bounded_json import parse_json
from enginery.errors import CheckpointError, UnsupportedError

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_ELEMENTS = 1 << 48

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `offset` and `nbytes` count bytes from the beginning of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name; no tensor byte is read. Raises CheckpointError naming the file and the tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), size, path)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: {count} tensors in one file, more than {MAX_TENSORS}")
    entries = parse_json(header, f"{path} (header)", max_depth=4, unique_keys=True)
    entries.pop("__metadata__", None)
    start = 8 + length
    infos = {name: _tensor_info(name, entry, path, start) for name, entry in entries.items()}
    _check_layout(infos, path, start, size)
    return infos


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, paged in on demand. The mapping is private: a write to it never reaches the file."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped ({error})") from None


def view(mapping: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    """The tensor as a view of the mapping, copied only where its bytes are not aligned to its dtype."""
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    if info.offset + info.nbytes > len(mapping):
        raise CheckpointError(f"{info.file}: became shorter after it was opened; tensor {info.name!r} is cut")
    data = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
    if info.offset % info.dtype.itemsize:
        data = data.clone()
    return data.view(info.dtype).view(info.shape)


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file", "Download the file again")
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: its header claims {length} bytes but the file has {size}",
            "Download the file again: it is truncated or not safetensors",
        )
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes is outside 2..{MAX_HEADER_BYTES}")
    return length


def _tensor_info(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    def fail(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:120]!r} {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str):
        raise fail("has a dtype that is not a string")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedError(f"{path}: tensor {name[:120]!r} has dtype {entry['dtype'][:20]!r}, which cannot be read")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_RANK or math.prod(shape) > MAX_ELEMENTS:
        raise fail(f"has an impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"has impossible offsets {str(offsets)[:80]}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise fail(f"takes {offsets[1] - offsets[0]} bytes but {entry['dtype']} {shape} needs {nbytes}")
    return TensorInfo(name, tuple(shape), dtype, path, start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_layout(infos: Mapping[str, TensorInfo], path: Path, start: int, size: int) -> None:
    end = start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            fault = "overlaps the one before it" if info.offset < end else f"leaves a hole of {info.offset - end} bytes"
            raise CheckpointError(f"{path}: tensor {info.name[:120]!r} {fault}")
        end += info.nbytes
    if end != size:
        fix = "Download the file again" if end > size else ""
        raise CheckpointError(f"{path}: tensors end at byte {end} but the file has {size}", fix)
