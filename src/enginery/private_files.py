"""Compiled code in the cache directory: what somebody else could have put there is not run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from enginery.errors import BuildError

_OTHER_CACHE = "Remove it or name another directory in ENGINERY_CACHE"


def private_directory(path: Path) -> Path:
    """Made if it is not there. Raises BuildError: it cannot be, or it is not this user's alone."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BuildError(
            f"cannot create {path}: {error.strerror}", "Name another directory in ENGINERY_CACHE"
        ) from None
    refuse_foreign(path)
    return path


def refuse_foreign(path: Path) -> None:
    """Raises BuildError: it is a link, or others own it or may write it."""
    try:
        status = path.lstat()
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}", f"Remove {path.parent}") from None
    if stat.S_ISLNK(status.st_mode):
        raise BuildError(f"{path} is a symbolic link", _OTHER_CACHE)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise BuildError(f"{path} belongs to or may be written by others", _OTHER_CACHE)


__all__ = ["private_directory", "refuse_foreign"]
