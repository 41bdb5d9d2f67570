"""engine.json: what an engine is, and the digest of each of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from enginery.errors import EngineFileError, NetworkError

FORMAT = 1
NAME = "engine.json"
MAX_BYTES = 8 << 20
REBUILD = "Build it again: enginery build MODEL -o DIR"

_FILE_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+){0,2}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class SourceFacts(Protocol):
    """What a frontend knows of a model; `Facts` has the same fields."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Facts:
    """Of the model that an engine runs."""

    architecture: str
    model_type: str
    vocab_size: int
    max_position_embeddings: int
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    dtype: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: SourceFacts) -> Facts:
        values = {item.name: getattr(source, item.name) for item in fields(cls)}
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        return cls(**values)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class FileEntry:
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    facts: Facts
    config: Mapping[str, Any]
    """as `BuildConfig.cache_key` gives it"""
    device: str
    phases: tuple[Mapping[str, Any], ...] = ()
    """name of each phase of rules and how often each of its rules applied"""
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """by path below the engine's directory"""

    def to_bytes(self) -> bytes:
        """The file. Equal manifests give equal bytes; its last word is the digest of all that it says."""
        content = {
            "format": FORMAT,
            "facts": asdict(self.facts),
            "config": dict(self.config),
            "device": self.device,
            "phases": [dict(phase) for phase in self.phases],
            "versions": dict(self.versions),
            "files": {name: {"bytes": entry.nbytes, "sha256": entry.digest} for name, entry in self.files.items()},
        }
        return _canonical(content | {"digest": _digest(content)})


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks engine.json. Raises EngineFileError that says what is wrong and how to rebuild."""
    path = directory / NAME
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EngineFileError(f"{path}: cannot be read ({error.strerror})", "Give an engine directory") from None
    if len(data) > MAX_BYTES:
        raise EngineFileError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no such file is", REBUILD)
    content = _parse(data, path)
    _require_format(content, path)
    stated = content.pop("digest", None)
    if stated != _digest(content) or _canonical(content | {"digest": stated}) != data:
        raise EngineFileError(f"{path} was changed after it was written", REBUILD)
    try:
        return _manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineFileError(f"{path} is not what this version writes ({error})", REBUILD) from None


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise EngineFileError(f"{path} is damaged: it is not valid JSON", REBUILD) from None
    if not isinstance(content, dict):
        raise EngineFileError(f"{path} is damaged: it is no JSON object", REBUILD)
    return content


def _require_format(content: Mapping[str, Any], path: Path) -> None:
    found = content.get("format")
    if type(found) is not int:
        raise EngineFileError(f"{path} names no format", REBUILD)
    if found != FORMAT:
        age = "newer than" if found > FORMAT else "older than"
        raise EngineFileError(
            f"{path.parent} has engine format {found}, {age} format {FORMAT} of this version", REBUILD
        )


def _manifest(content: Mapping[str, Any]) -> Manifest:
    facts = dict(content["facts"])
    facts["eos_token_ids"] = tuple(facts["eos_token_ids"])
    files = {name: FileEntry(int(entry["bytes"]), entry["sha256"]) for name, entry in content["files"].items()}
    for name, entry in files.items():
        if not _FILE_NAME.match(name) or ".." in name or entry.nbytes < 0 or not _DIGEST.match(entry.digest):
            raise ValueError(f"file {name[:80]!r}")
    return Manifest(
        Facts(**facts), content["config"], content["device"], tuple(content["phases"]), content["versions"], files
    )


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical(content)).hexdigest()
    except (ValueError, RecursionError) as error:
        raise NetworkError(str(error)) from None


__all__ = ["FORMAT", "Facts", "FileEntry", "Manifest", "read_manifest"]
