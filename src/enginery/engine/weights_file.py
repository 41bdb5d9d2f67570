"""Weight files of an engine: safetensors whose places are known before the first value is computed.

Shapes and dtypes of all weights are known from the network, so each file's header is written first and every weight
goes to its place as soon as it is computed. Within a file the weights lie in the order that keeps them aligned to 64
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from enginery.engine.binding import nbytes
from enginery.engine.storage import write_at
from enginery.errors import EngineFileError
from enginery.network import Tensor

SHARD_BYTES = 4 << 30
ALIGNMENT = 64

_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a weight's bytes are: file and bytes from its beginning."""

    file: str
    offset: int


@dataclass(frozen=True)
class Shard:
    file: str
    header: bytes
    nbytes: int
    """of header and data"""


@dataclass(frozen=True)
class Layout:
    shards: tuple[Shard, ...]
    places: Mapping[str, Place]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def plan_layout(weights: Sequence[Tensor], shard_bytes: int = SHARD_BYTES) -> Layout:
    """A place for every weight, in files of at most `shard_bytes` (one weight that is larger has a file of its own)."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + nbytes(weight) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += nbytes(weight)
    shards, places = [], {}
    for number, group in enumerate(groups, 1):
        shard, found = _plan_shard(f"weights-{number:05}-of-{len(groups):05}.safetensors", group)
        shards.append(shard)
        places.update(found)
    return Layout(tuple(shards), places)


def _plan_shard(file: str, weights: Iterable[Tensor]) -> tuple[Shard, dict[str, Place]]:
    # Whole multiples of the alignment first: they keep it for those that follow. The rest by falling element size.
    order = sorted(weights, key=lambda w: (nbytes(w) % ALIGNMENT != 0, -w.dtype.itemsize))
    entries: dict[str, dict[str, object]] = {}
    begins: dict[str, int] = {}
    position = 0
    for weight in order:
        begins[weight.name], position = position, position + nbytes(weight)
        entries[weight.name] = {
            "dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": [begins[weight.name], position],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places = {name: Place(file, len(header) + begin) for name, begin in begins.items()}
    return Shard(file, header, len(header) + position), places


class WeightWriter:
    """Writes weights in any order: `with WeightWriter(directory, layout) as writer: writer.write(name, value)`.

    Raises OSError. Files are flushed to the disk when the block ends well.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._layout = layout
        self._files: dict[str, int] = {}
        try:
            for shard in layout.shards:
                descriptor = os.open(directory / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._files[shard.file] = descriptor
                os.ftruncate(descriptor, shard.nbytes)
                write_at(descriptor, memoryview(shard.header), 0)
        except OSError:
            self._close()
            raise

    def write(self, name: str, value: torch.Tensor) -> None:
        place = self._layout.places[name]
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        write_at(self._files[place.file], flat.numpy().data, place.offset)

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for descriptor in self._files.values():
                    os.fsync(descriptor)
        finally:
            self._close()


def map_weights(paths: Sequence[Path], expected: Sequence[Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a network as views of the mapped files. Raises EngineFileError where they are not what it
    needs.
    """
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    found[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise EngineFileError(f"{path}: not a weight file ({error})", "Build the engine again") from None
    for tensor in expected:
        value = found.get(tensor.name)
        if value is None:
            raise EngineFileError(f"{paths[0].parent}: weight {tensor.name} is missing", "Build the engine again")
        if value.dtype != tensor.dtype or tuple(value.shape) != tensor.shape:
            found_type = f"{value.dtype} {list(value.shape)}"
            raise EngineFileError(
                f"{paths[0].parent}: weight {tensor.name} is {found_type} where the network needs {tensor!r}",
                "Build the engine again",
            )
    return found


__all__ = ["Layout", "WeightWriter", "map_weights", "plan_layout"]
