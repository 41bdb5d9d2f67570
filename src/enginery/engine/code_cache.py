"""Where compiled regions are kept: a directory of the user's own. Compiled code is loaded from here and from nowhere
else.

    CACHE/regions/FINGERPRINT/KEY.pt2, and KEY-DIGEST.o for what several of them share

FINGERPRINT stands for all that compiled code depends on beside the region itself: torch, this package, the operators,
the device, the instruction set. Code that comes with an engine directory is taken in only if it carries this user's
signature (it was compiled here, by this user) or if the caller says that it may be trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from enginery import env, ops
from enginery.engine.digest import file_digests, text_digest
from enginery.errors import EngineFileError, ResourceError
from enginery.private_files import PrivateFiles

SIGNATURE = "SIGNATURE"
_PRIVATE = PrivateFiles(foreign=EngineFileError, unusable=ResourceError)
SUFFIX = ".pt2"
OBJECT = ".o"

_KEY_BYTES = 32
_RECIPE = 2
"""Raised when regions are compiled differently from the same text."""


def fingerprint(device: str) -> str:
    """16 hex digits that differ wherever compiled code would."""
    facts = {
        "torch": torch.__version__,
        "enginery": metadata.version("enginery"),
        "recipe": _RECIPE,
        "ops": [str(op.overload._schema) for op in ops.OPS],
        "device": device,
        "machine": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu": _cpu_flags(),
    }
    if device == "cuda":
        facts["gpu"] = (torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.version.cuda)
    return text_digest(facts)[:16]


def _cpu_flags() -> str:
    """The line of /proc/cpuinfo that names the processor's features; `-march=native` reads the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _object_name(key: str, path: Path) -> str:
    return f"{key}-{file_digests([path])[path][:32]}{OBJECT}"


class CodeCache:
    """Compiled regions of one fingerprint."""

    def __init__(self, fingerprint: str, root: Path | None = None) -> None:
        self.fingerprint = fingerprint
        self.root = root or env.cache_dir()
        self.directory = self.root / "regions" / fingerprint

    def find(self, key: str) -> Path | None:
        """The compiled region, if it is here and nobody else could have put it here."""
        path = self.directory / f"{key}{SUFFIX}"
        return self._own(path) if path.exists() else None

    def find_object(self, key: str) -> Path | None:
        """An object file, likewise, and if it is whole: a linker takes an empty one without a word."""
        for path in self.directory.glob(f"{key}-*{OBJECT}"):
            if self._own(path).name == _object_name(key, path):
                return path
        return None

    def _own(self, path: Path) -> Path:
        _PRIVATE.directory(self.directory)
        _PRIVATE.require(path)
        return path

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A private directory for the compiler's files."""
        return tempfile.TemporaryDirectory(prefix=".building-", dir=_PRIVATE.directory(self.directory))

    def publish(self, key: str, finished: Path) -> Path:
        """Moves a finished file from `scratch` to its place; of two processes the later one wins, with equal code."""
        return self._publish(finished, f"{key}{SUFFIX}")

    def publish_object(self, key: str, finished: Path) -> Path:
        return self._publish(finished, _object_name(key, finished))

    def _publish(self, finished: Path, name: str) -> Path:
        finished.chmod(0o600)
        return finished.replace(self.directory / name)

    def sign(self, paths: Sequence[Path]) -> bytes:
        """What makes copies of these files recognisable as this user's own."""
        return self._signature({path.name: path.read_bytes() for path in paths}).encode()

    def adopt(self, paths: Mapping[str, Path], *, trust: bool) -> list[str]:
        """Copies compiled regions of an engine directory into the cache; gives their keys, or none if they are not
        trusted.
        """
        if not paths:
            return []
        try:
            contents = {path.name: path.read_bytes() for path in paths.values()}
            claimed = (next(iter(paths.values())).parent / SIGNATURE).read_bytes().decode("ascii", "replace")
        except OSError:
            claimed = ""
        if not trust and not hmac.compare_digest(claimed.encode(), self._signature(contents).encode()):
            return []
        for key, path in paths.items():
            if self.find(key) is None:
                with self.scratch() as scratch:
                    copy = Path(scratch) / path.name
                    copy.write_bytes(contents[path.name])
                    self.publish(key, copy)
        return list(paths)

    def _signature(self, contents: Mapping[str, bytes]) -> str:
        lines = [f"{name} {hashlib.sha256(contents[name]).hexdigest()}" for name in sorted(contents)]
        return hmac.new(self._key(), "\n".join([self.fingerprint, *lines]).encode(), hashlib.sha256).hexdigest()

    def _key(self) -> bytes:
        """This user's secret on this machine, made on first use."""
        path = _PRIVATE.directory(self.root / "regions") / "signing-key"
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            try:
                os.link(file.name, path)  # fails where another process was faster
            except FileExistsError:
                pass
            finally:
                os.unlink(file.name)
        _PRIVATE.require(path)
        return path.read_bytes()


__all__ = ["SIGNATURE", "CodeCache", "fingerprint"]
