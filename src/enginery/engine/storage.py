"""Writing a directory so that a reader sees the old one or the new one, never half of either.

Files are written into a hidden directory beside the target, flushed to the disk, and moved into place by one rename
(two directories change places in one system call). The hidden directory is locked while its writer lives; what a killed
writer left behind is found by its free lock and removed by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from enginery.errors import EngineFileError, ResourceError

ELSEWHERE = "Choose another --output (ENGINERY_CACHE for the cache)"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MAX_WRITE = 1 << 30


@contextmanager
def replacing(target: Path, need: int) -> Iterator[Path]:
    """Gives an empty directory that takes the place of `target` when the block ends well, and vanishes when it does
    not.

    `need` is the number of bytes that will be written. Raises ResourceError where they do not fit, before and during
    the writing, and EngineFileError where the place cannot be written; `target` is then as it was.
    """
    target = Path(os.path.abspath(target))
    with errors_told(target, need):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        _require_space(target.parent, need)
        scratch = target.with_name(f".{target.name}.building-{secrets.token_hex(4)}")
        os.mkdir(scratch)
    lock: int | None = None
    try:
        with errors_told(target, need):
            lock = _lock(scratch)
        yield scratch
        with errors_told(target, need):
            _flush_tree(scratch)
            _put_in_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def errors_told(target: Path, need: int) -> Iterator[None]:
    """Turns errors of the file system into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_space(target.parent, need) from None
        raise EngineFileError(f"cannot write {target}: {error.strerror or error}", ELSEWHERE) from None


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file and flushes it to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_at(descriptor, memoryview(data), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at a place of an open file. Raises OSError."""
    while data.nbytes:
        written = os.pwrite(descriptor, data[:_MAX_WRITE], offset)
        data, offset = data[written:], offset + written


def _require_space(directory: Path, need: int) -> None:
    if shutil.disk_usage(directory).free < need:
        raise _no_space(directory, need)


def _no_space(directory: Path, need: int) -> ResourceError:
    existing = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    return ResourceError(
        f"No space left on device: need {need / 2**30:.2f} GiB, have {free / 2**30:.2f} GiB in {existing}",
        f"Free some. {ELSEWHERE}",
    )


def _lock(scratch: Path) -> int:
    """Holds a lock on the directory as long as this process lives; without effect where the file system has no
    locks.
    """
    descriptor = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep(target: Path) -> None:
    """Removes what writers of `target` that are dead left behind."""
    for path in target.parent.glob(f".{target.name}.building-*"):
        with suppress(OSError):  # its writer lives, or another process sweeps
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _flush_tree(directory: Path) -> None:
    """Files are flushed by those who wrote them; the entries of the directories are flushed here."""
    for path, _, _ in os.walk(directory):
        _flush_directory(Path(path))


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(scratch: Path, target: Path) -> None:
    if target.exists():
        _exchange(scratch, target)
    else:
        os.rename(scratch, target)
    with suppress(OSError):
        _flush_directory(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Two directories change places, at once where the kernel can."""
    library = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is not None:
        paths = os.fsencode(one), os.fsencode(other)
        if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    aside = one.with_name(f"{one.name}.old")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


__all__ = ["errors_told", "replacing", "write_at", "write_file"]
