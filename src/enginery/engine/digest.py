"""Digests of files, at the speed of the memory: chunks of 64 MiB are hashed side by side.

The digest of a file is the SHA-256 of its bytes if it has one chunk, else the SHA-256 of its chunks' SHA-256 in order.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 64 << 20


def file_digests(paths: Sequence[Path], threads: int | None = None) -> dict[Path, str]:
    """The hex digest of each file. Reads the files; raises OSError."""
    pieces = [(path, start) for path in paths for start in range(0, max(path.stat().st_size, 1), CHUNK)]
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        hashed = list(pool.map(lambda piece: _chunk(*piece), pieces))
    chunks: dict[Path, list[bytes]] = {path: [] for path in paths}
    for (path, _), digest in zip(pieces, hashed, strict=True):
        chunks[path].append(digest)
    return {path: _combine(found) for path, found in chunks.items()}


def _chunk(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return hashlib.sha256().digest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as data:
            return hashlib.sha256(data[start : start + CHUNK]).digest()


def _combine(chunks: Sequence[bytes]) -> str:
    return chunks[0].hex() if len(chunks) == 1 else hashlib.sha256(b"".join(chunks)).hexdigest()


def text_digest(parts: Mapping[str, object]) -> str:
    """A key of named facts."""
    lines = "\n".join(f"{name}={parts[name]}" for name in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


__all__ = ["CHUNK", "file_digests", "text_digest"]
