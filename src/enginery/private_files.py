"""Compiled code in the cache directory: what somebody else could have put there is not run."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from enginery.errors import EngineryError

_OTHER_CACHE = "Remove it or name another directory in ENGINERY_CACHE"


@dataclass(frozen=True)
class PrivateFiles:
    """Checks that raise what the owner of the files says."""

    foreign: type[EngineryError]
    """for a link, or what others own or may write"""
    unusable: type[EngineryError]
    """for what cannot be made or read"""

    def directory(self, path: Path) -> Path:
        """Made if it is not there."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self.unusable(
                f"cannot create {path}: {error.strerror}", "Name another directory in ENGINERY_CACHE"
            ) from None
        self.require(path)
        return path

    def require(self, path: Path) -> None:
        """It is this user's alone."""
        try:
            status = path.lstat()
        except OSError as error:
            raise self.unusable(f"cannot read {path}: {error.strerror}", f"Remove {path.parent}") from None
        if stat.S_ISLNK(status.st_mode):
            raise self.foreign(f"{path} is a symbolic link", _OTHER_CACHE)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise self.foreign(f"{path} belongs to or may be written by others", _OTHER_CACHE)


__all__ = ["PrivateFiles"]
