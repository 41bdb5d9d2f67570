"""A Hugging Face checkpoint directory: its configuration, and its tensors by name, mapped and never copied."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from enginery.checkpoint.bounded_json import read_json
from enginery.checkpoint.config import check_config, decoder_config
from enginery.checkpoint.hub import looks_like_hub_id, snapshot
from enginery.checkpoint.safetensors_file import TensorInfo, map_file, read_header, view
from enginery.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
HASHED_WHOLE = 64 << 20
"""files up to this size enter the digest with all their bytes; larger ones with header, size and times"""

A_MODEL = "Give a model directory or a Hugging Face hub id"
MAX_NAME = 200
"""characters of a name that an error repeats"""

_SHARD = re.compile(r"[\w.+-]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint:
    """An opened model directory. Headers are verified on opening; tensor bytes are paged in when they are read."""

    def __init__(self, directory: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        generation = directory / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Opens a local directory or a model id of the Hugging Face hub (safetensors only).

        Raises CheckpointError for what is missing or corrupt and UnsupportedError for what cannot be read, in one line.
        """
        directory = _locate(source)
        if not (directory / "config.json").is_file():
            raise _no_config(directory)
        config = read_json(directory / "config.json")
        check_config(config, str(directory / "config.json"))
        return cls(directory, config, _read_tensors(directory))

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name as a view of its mapped file; the mapping goes with it, and so do the pages it took.

        Raises CheckpointError if there is none.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.directory}: no tensor is named {name!r}")
        return view(map_file(info.file), info)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of generation_config.json, else of config.json; empty if there are none."""
        for table in (self.generation_config, decoder_config(self.config), self.config):
            value = table.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(item) is not int for item in ids):
                raise CheckpointError(f"{self.directory}: eos_token_id is {str(value)[:60]!r}, not token ids")
            if found := tuple(item for item in ids if item >= 0):
                return found
        return ()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def digest(self) -> str:
        """Hex SHA-256 that changes when the content does, without reading large weights.

        Small files count with all their bytes. A file above 64 MiB counts with its size, its modification time and its
        inode's change time, which every write sets; a copied or touched large file therefore gets a new digest too.
        """
        digest = hashlib.sha256()
        weights = {info.file for info in self.tensors.values()}
        endings = (".json", ".jinja", ".model")
        sidecars = (path for path in self.directory.iterdir() if path.suffix in endings and path.is_file())
        for path in sorted({*weights, *sidecars}):
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0".encode())
            if facts.st_size <= HASHED_WHOLE:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            else:
                digest.update(f"{facts.st_mtime_ns}\0{facts.st_ctime_ns}\0".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.directory}: {self.config['model_type']}, {len(self.tensors)} tensors>"


def _locate(source: str | os.PathLike[str]) -> Path:
    if not str(source):
        raise CheckpointError("the name of the model is empty", A_MODEL)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        is_there = path.exists()
    except (OSError, RuntimeError):  # a name that no file can have, the home of nobody
        raise _missing(source) from None
    if path.suffix == ".gguf":
        raise UnsupportedError(
            f"{path}: GGUF files cannot be read yet", "Give the Hugging Face checkpoint that it was made from"
        )
    if is_there:
        raise CheckpointError(f"{path} is a file", "Give the directory that holds config.json and *.safetensors")
    if isinstance(source, str) and looks_like_hub_id(source):
        return snapshot(source)
    raise _missing(source)


def _missing(source: str | os.PathLike[str]) -> CheckpointError:
    name = str(source)
    short = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
    return CheckpointError(f"{short} does not exist", f"{A_MODEL} such as org/name")


def _no_config(directory: Path) -> CheckpointError | UnsupportedError:
    if (directory / "adapter_config.json").is_file():
        return UnsupportedError(
            f"{directory} is a LoRA adapter, not a model", "Give the base model, or merge the adapter into it"
        )
    if any(directory.glob("*.gguf")):
        return UnsupportedError(
            f"{directory} holds GGUF files, which cannot be read yet", "Give the Hugging Face checkpoint"
        )
    if (directory / "engine.json").is_file():
        return CheckpointError(f"{directory} is an engine, not a checkpoint")
    return CheckpointError(f"{directory} has no config.json", "Give a directory with config.json and *.safetensors")


def _read_tensors(directory: Path) -> dict[str, TensorInfo]:
    if (directory / INDEX).is_file():
        return _read_shards(directory)
    files = [
        path
        for path in sorted(directory.glob("*.safetensors"))
        if not path.name.startswith(("consolidated", "adapter_"))
    ]
    if not files:
        raise _no_weights(directory)
    if len(files) > 1 and not (directory / "model.safetensors").is_file():
        raise CheckpointError(f"{directory} has {len(files)} weight files but no {INDEX}", "Download the index too")
    return read_header(_inside(directory, "model.safetensors" if len(files) > 1 else files[0].name))


def _no_weights(directory: Path) -> CheckpointError | UnsupportedError:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return UnsupportedError(
            f"{directory} has its weights in {pickles[0]}, a pickle that may run code and is never opened",
            "Convert it: load it with transformers where you trust it and call save_pretrained: safetensors",
        )
    return CheckpointError(f"{directory} has no weights (*.safetensors)", "Download them into it")


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    weight_map = read_json(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index}: tensor {name[:120]!r} is in {str(shard)[:120]!r}, no safetensors file of this directory"
            )
        if shard not in headers:
            headers[shard] = read_header(_inside(directory, shard))
        if name not in headers[shard]:
            raise CheckpointError(f"{index}: tensor {name[:120]!r} is listed in {shard} but is not there")
        tensors[name] = headers[shard][name]
    return tensors


def _inside(directory: Path, name: str) -> Path:
    """The file of that name, which must lie in the directory, or in the hub cache's blobs if it is part of one."""
    path, root = directory / name, directory.resolve()
    if not path.is_file():
        raise CheckpointError(f"{directory}: weight file {name} is missing", "Download it")
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise CheckpointError(
            f"{path} is a link that leads out of the model directory", "Copy the file into the directory"
        )
    return path
