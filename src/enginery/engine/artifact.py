"""An engine on disk: data and digests, and compiled code that is not trusted.

engine.json                        what it is; digest of every other file
network.txt                        the network that runs in every step, in text
weights-00001-of-0000N.safetensors its constants
tokenizer.json, …                  files of the checkpoint that are carried along
kernels/FINGERPRINT/KEY.pt2        compiled regions; may be missing or for another machine
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from enginery.engine.digest import file_digests
from enginery.engine.manifest import NAME, REBUILD, FileEntry, Manifest, read_manifest
from enginery.engine.memory import caches
from enginery.engine.protocol import NETWORK_INPUTS, Progress
from enginery.engine.storage import errors_told, replacing, write_file
from enginery.engine.weights_file import Layout, WeightWriter, map_weights
from enginery.errors import EngineFileError, NetworkError, UsageError
from enginery.network import Network

NETWORK = "network.txt"
KERNELS = "kernels"
WEIGHTS = "weights-"
MAX_NETWORK_BYTES = 256 << 20

_SPARE_BYTES = 16 << 20
"""room for the network, the manifest and compiled regions"""


def is_engine(path: Path) -> bool:
    """There is an engine in this directory, sound or not."""
    try:
        return (Path(path) / NAME).is_file()
    except OSError:  # a name that no file can have
        return False


class ArtifactWriter:
    """Fills the hidden directory of an engine that is being built. Made by `writing`."""

    def __init__(self, directory: Path, target: Path, need: int) -> None:
        self.directory = directory
        self._target = target
        self._need = need

    def write_weights(self, layout: Layout, values: Iterator[tuple[str, torch.Tensor]]) -> None:
        with errors_told(self._target, self._need), WeightWriter(self.directory, layout) as writer:
            for name, value in values:
                writer.write(name, value)

    def write_network(self, network: Network) -> None:
        with errors_told(self._target, self._need):
            write_file(self.directory / NETWORK, str(network).encode())

    def carry(self, paths: Sequence[Path]) -> None:
        """Copies files of the checkpoint."""
        for path in paths:
            if path.name in (NAME, NETWORK, KERNELS):
                raise UsageError(f"{path} cannot be carried along: the engine has a file of its own with that name")
            with errors_told(self._target, self._need):
                write_file(self.directory / path.name, path.read_bytes())

    def add_kernels(self, fingerprint: str, paths: Sequence[Path]) -> None:
        with errors_told(self._target, self._need):
            folder = self.directory / KERNELS / fingerprint
            folder.mkdir(parents=True)
            for path in paths:
                write_file(folder / path.name, path.read_bytes())

    def finish(self, manifest: Manifest) -> Manifest:
        """Digests what was written and writes engine.json, the last file."""
        with errors_told(self._target, self._need):
            files = _files(self.directory)
            digests = file_digests([self.directory / name for name in files])
            entries = {
                name: FileEntry((self.directory / name).stat().st_size, digests[self.directory / name])
                for name in files
            }
            manifest = dataclasses.replace(manifest, files=entries)
            write_file(self.directory / NAME, manifest.to_bytes())
        return manifest


@contextmanager
def writing(target: Path, weight_bytes: int) -> Iterator[ArtifactWriter]:
    """`with writing(directory, bytes) as writer`: the engine appears in `directory` when the block ends well.

    Raises UsageError if `directory` holds something that is no engine, ResourceError where the disk is full. A former
    engine in `directory` stays until then.
    """
    target = Path(target)
    _require_replaceable(target)
    need = weight_bytes + _SPARE_BYTES
    with replacing(target, need) as scratch:
        yield ArtifactWriter(scratch, target, need)


def _require_replaceable(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is not a directory", "Choose another --output")
    if target.is_dir() and any(target.iterdir()) and not is_engine(target):
        raise UsageError(f"{target} holds files that are no engine", "Choose another --output, or empty it")


@dataclass(frozen=True)
class Artifact:
    """An engine on disk, opened and verified; see `open_artifact` for its weights."""

    directory: Path
    manifest: Manifest
    network: Network

    @contextmanager
    def verifying_weights(self, report: Progress | None = None) -> Iterator[None]:
        """Verifies the weight files beside what the block does, which ends when both have ended.

        Raises EngineFileError, also in the place of what the block raises: that may follow from a damaged file.
        """
        files = [name for name in self.manifest.files if name.startswith(WEIGHTS)]
        report = report or (lambda stage, done, total: None)
        report("verify", 0, len(files))
        with ThreadPoolExecutor(1) as beside:
            verified = beside.submit(_verify_digests, self.directory, self.manifest, files)
            try:
                yield
            finally:
                verified.result()
        report("verify", len(files), len(files))

    def weights(self) -> dict[str, torch.Tensor]:
        """By the names of the network's constants, mapped, paged in when they are read."""
        names = [name for name in self.manifest.files if name.startswith(WEIGHTS)]
        return map_weights([self.directory / name for name in sorted(names)], self.network.constants)

    def kernels(self, fingerprint: str) -> dict[str, Path]:
        """Compiled regions that came with the engine, by key; their digests agree with engine.json."""
        folder = f"{KERNELS}/{fingerprint}/"
        names = [name for name in self.manifest.files if name.startswith(folder)]
        paths = [self.directory / name for name in names]
        return {path.stem: path for path in paths if path.is_file() and path.suffix == ".pt2"}

    def is_foreign(self, fingerprint: str) -> bool:
        """It came with compiled regions, but with none for this machine."""
        folders = {name.split("/")[1] for name in self.manifest.files if name.startswith(f"{KERNELS}/")}
        return bool(folders) and fingerprint not in folders


def open_artifact(directory: Path, *, weights: bool = True) -> Artifact:
    """Verifies every byte and reads the network. Without `weights`, their bytes are left to `verifying_weights`.

    Raises EngineFileError: a file is missing, changed, too many or a link; the format is not this version's; the
    network is invalid. Compiled regions may be missing.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    present = _verify_presence(directory, manifest)
    _verify_digests(directory, manifest, [name for name in present if weights or not name.startswith(WEIGHTS)])
    try:
        network = Network.parse((directory / NETWORK).read_text(encoding="utf-8"))
        network.verify()
        _require_borders(network)
    except (NetworkError, UnicodeDecodeError) as error:
        raise EngineFileError(f"{directory / NETWORK}: {error}", REBUILD) from None
    return Artifact(directory, manifest, network)


def _require_borders(network: Network) -> None:
    """The network takes what an engine gives it in a step and returns logits. Raises NetworkError."""
    known = {*NETWORK_INPUTS, *(tensor.name for tensor in caches(network))}
    unknown = next((tensor for tensor in network.inputs if tensor.name not in known), None)
    if unknown is not None:
        raise NetworkError(f"input {unknown.name} is nothing that a step gives")
    if network.output_names != ("logits",) or not network.outputs[0].dtype.is_floating_point:
        raise NetworkError(f"its outputs are {', '.join(network.output_names)}, not logits")


def _verify_digests(directory: Path, manifest: Manifest, files: Collection[str]) -> None:
    with _reading(directory):
        digests = file_digests([directory / name for name in files])
    for name in files:
        if digests[directory / name] != manifest.files[name].digest:
            stated = manifest.files[name].digest[:16]
            found = digests[directory / name][:16]
            raise EngineFileError(f"{directory / name} was changed: its digest is {found}…, not {stated}…", REBUILD)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineFileError(f"{directory}: cannot be read ({error.strerror or error})", REBUILD) from None


def _verify_presence(directory: Path, manifest: Manifest) -> list[str]:
    """The files that are there, in the order of the manifest: all but compiled regions have to be, and no others."""
    with _reading(directory):
        present = _files(directory)
        _verify_sizes(directory, manifest, present)
    return [name for name in manifest.files if name in present]


def _verify_sizes(directory: Path, manifest: Manifest, present: set[str]) -> None:
    extra = present - manifest.files.keys() - {NAME}
    if extra:
        raise EngineFileError(f"{directory / min(extra)} is not part of the engine", "Remove it")
    for name, entry in sorted(manifest.files.items()):
        if name not in present:
            if name.startswith(f"{KERNELS}/"):
                continue
            raise EngineFileError(f"{directory / name} is missing", REBUILD)
        size = (directory / name).stat().st_size
        if size != entry.nbytes:
            raise EngineFileError(f"{directory / name} has {size} bytes, not {entry.nbytes}", REBUILD)
    if NETWORK not in present:
        raise EngineFileError(f"{directory / NETWORK} is missing", REBUILD)
    if (directory / NETWORK).stat().st_size > MAX_NETWORK_BYTES:
        raise EngineFileError(f"{directory / NETWORK} is larger than any network", REBUILD)


def _files(directory: Path) -> set[str]:
    """Paths below the directory. Raises EngineFileError for anything but plain files and directories."""
    found = set()
    for path in directory.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found.add(path.relative_to(directory).as_posix())
        elif not stat.S_ISDIR(mode):
            raise EngineFileError(f"{path} is a link or a special file", "Put the file itself in its place")
    return found


def remove(directory: Path) -> None:
    """Deletes an engine."""
    os.unlink(Path(directory) / NAME)
    shutil.rmtree(directory)


__all__ = ["Artifact", "ArtifactWriter", "is_engine", "open_artifact", "writing"]
