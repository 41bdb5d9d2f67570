"""An engine directory is what was built, or it is refused; a build that fails leaves the former engine as it was."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.conftest import EAGER
from tests.engine.decoder import Batcher, Decoder, Imported, imported, random_tokens, reader

from enginery.engine import artifact, digest, storage
from enginery.engine.artifact import is_engine, open_artifact
from enginery.engine.builder import build
from enginery.engine.engine import Engine
from enginery.engine.manifest import FORMAT, read_manifest
from enginery.engine.weights_file import plan_layout
from enginery.errors import EngineFileError, EngineryError, ResourceError, UsageError
from enginery.network import Network


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def resealed(directory: Path, change: Callable[[dict], None]) -> None:
    """Changes engine.json and gives it the digest that fits, as a forger would."""
    content = json.loads((directory / "engine.json").read_text())
    content.pop("digest")
    change(content)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / "engine.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


# What is written


def test_an_engine_is_data(eager_engine: Path) -> None:
    assert is_engine(eager_engine)
    assert sorted(contents(eager_engine)) == ["engine.json", "network.txt", "weights-00001-of-00001.safetensors"]
    weights = load_file(eager_engine / "weights-00001-of-00001.safetensors")
    network = Network.parse((eager_engine / "network.txt").read_text())
    assert sorted(weights) == sorted(tensor.name for tensor in network.constants)
    assert read_manifest(eager_engine).facts.eos_token_ids == (1,)


def test_the_same_build_gives_the_same_bytes(eager_engine: Path, tmp_path: Path, model: Decoder) -> None:
    build(imported(model), reader(model), EAGER, tmp_path / "again").close()
    assert contents(tmp_path / "again") == contents(eager_engine)


def test_files_are_carried_along(tmp_path: Path, in_cache: None, model: Decoder, source: Imported) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    build(source, reader(model), EAGER, tmp_path / "engine", carry=[tmp_path / "tokenizer.json"]).close()
    assert (tmp_path / "engine" / "tokenizer.json").read_text() == "{}"
    assert "tokenizer.json" in read_manifest(tmp_path / "engine").files


def test_an_engine_in_memory_computes_the_same(eager_engine: Path, model: Decoder, source: Imported) -> None:
    in_memory = build(source, reader(model), EAGER)
    inputs, expected = (batcher := Batcher(model)).step([(batcher.add(random_tokens(9, 0)), 9)])
    torch.testing.assert_close(in_memory.execute(inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Engine.load(eager_engine, EAGER).execute(inputs), expected, rtol=1e-5, atol=1e-5)
    assert in_memory.directory is None


def test_weights_are_spread_over_files_and_aligned() -> None:
    network = Network()
    tensors = [network.add_constant(f"w{i}", (size,), torch.float32) for i, size in enumerate((16, 3, 32, 64, 1, 160))]
    layout = plan_layout(tensors, shard_bytes=256)
    assert [shard.file for shard in layout.shards] == [f"weights-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [len([p for p in layout.places.values() if p.file == shard.file]) for shard in layout.shards] == [3, 1, 1, 1]
    assert all(layout.places[f"w{i}"].offset % 64 == 0 for i in (0, 2, 3, 5))
    assert set(layout.places) == {tensor.name for tensor in tensors}


# What is refused


def test_any_flipped_byte_is_found(eager_engine: Path) -> None:
    generator = random.Random(7)
    for name, original in contents(eager_engine).items():
        places = range(len(original)) if name == "engine.json" else generator.sample(range(len(original)), 12)
        for place in generator.sample(list(places), min(60, len(places))):
            damaged = bytearray(original)
            damaged[place] ^= 1 << generator.randrange(8)
            (eager_engine / name).write_bytes(damaged)
            with pytest.raises(EngineFileError):
                open_artifact(eager_engine)
        (eager_engine / name).write_bytes(original)
    open_artifact(eager_engine)


@pytest.mark.parametrize("place", [0, 20, -1])
def test_damaged_weights_are_found_beside_the_opening(eager_engine: Path, place: int) -> None:
    """A damaged header, too, whose reader would say something else."""
    path = next(eager_engine.glob("weights-*"))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    opened = open_artifact(eager_engine, weights=False)
    with pytest.raises(EngineFileError, match=r"weights-\S+ was changed: its digest is"), opened.verifying_weights():
        pass
    with pytest.raises(EngineFileError, match=r"weights-\S+ was changed: its digest is"):
        Engine.load(eager_engine, EAGER)


def test_what_fails_beside_sound_weights_is_told(eager_engine: Path) -> None:
    opened = open_artifact(eager_engine)
    with pytest.raises(ResourceError, match="no room"), opened.verifying_weights():
        raise ResourceError("no room", "Make some")


def test_digests_cover_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "CHUNK", 64)
    path = tmp_path / "file"
    for size in (0, 1, 64, 65, 200):
        original = bytearray(random.Random(size).randbytes(size))
        path.write_bytes(original)
        (before,) = digest.file_digests([path]).values()
        for place in range(0, size, 7):
            changed = bytearray(original)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert digest.file_digests([path])[path] != before
    assert digest.file_digests([path, eager := tmp_path / "file"])[eager]


@pytest.mark.parametrize("name", ["engine.json", "network.txt", "weights-00001-of-00001.safetensors"])
def test_a_truncated_or_missing_file(eager_engine: Path, name: str) -> None:
    whole = (eager_engine / name).read_bytes()
    (eager_engine / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineFileError):
        Engine.load(eager_engine, EAGER)
    (eager_engine / name).unlink()
    with pytest.raises(EngineFileError):
        Engine.load(eager_engine, EAGER)


def test_an_extra_file(eager_engine: Path) -> None:
    (eager_engine / "kernels").mkdir()
    (eager_engine / "kernels" / "extra.so").write_bytes(b"x")
    with pytest.raises(EngineFileError, match="not part of the engine"):
        Engine.load(eager_engine, EAGER)


@pytest.mark.parametrize("name", ["network.txt", "weights-00001-of-00001.safetensors"])
def test_a_link_in_the_place_of_a_file(eager_engine: Path, tmp_path: Path, name: str) -> None:
    shutil.move(eager_engine / name, tmp_path / "elsewhere")
    (eager_engine / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineFileError, match="link"):
        Engine.load(eager_engine, EAGER)


def test_a_future_format_names_both_versions_and_the_command(eager_engine: Path) -> None:
    resealed(eager_engine, lambda content: content.update(format=FORMAT + 1, invented={"later": True}))
    with pytest.raises(
        EngineFileError, match=rf"format {FORMAT + 1}, newer than format {FORMAT}.*enginery build"
    ) as caught:
        Engine.load(eager_engine, EAGER)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("facts"), lambda content: content["facts"].update(extra=1),
        lambda content: content.update(files=[]), lambda content: content.update(format="1"),
        lambda content: content["files"].update({"../outside": {"bytes": 1, "sha256": "0" * 64}}),
        lambda content: content["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda content: content["files"]["network.txt"].update(bytes=-1),
        lambda content: content["files"].pop("network.txt"), lambda content: content["facts"].update(eos_token_ids=5),
    ],
)  # fmt: skip
def test_a_forged_manifest(eager_engine: Path, change: Callable[[dict], None]) -> None:
    resealed(eager_engine, change)
    with pytest.raises(EngineFileError):
        Engine.load(eager_engine, EAGER)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("enginery.packed_linear(", "prims.device_put("), ("aten.embedding(", "aten.no_such_operator("),
        ("aten.embedding(", "os.system("), ("float32[tokens", "float32[7, tokens"), ("%token_ids", "%nothing"),
    ],
)  # fmt: skip
def test_a_forged_network(eager_engine: Path, old: str, new: str) -> None:
    text = (eager_engine / "network.txt").read_text()
    assert old in text
    forged = text.replace(old, new).encode()
    (eager_engine / "network.txt").write_bytes(forged)

    def seal(content: dict) -> None:
        content["files"]["network.txt"] = {"bytes": len(forged), "sha256": hashlib.sha256(forged).hexdigest()}

    resealed(eager_engine, seal)
    with pytest.raises(EngineFileError, match=r"network\.txt"):
        Engine.load(eager_engine, EAGER)


def test_weights_that_are_not_the_networks(eager_engine: Path) -> None:
    path = eager_engine / "weights-00001-of-00001.safetensors"
    text = path.read_bytes().replace(b'"norm.weight"', b'"norm.weighT"')
    path.write_bytes(text)

    def seal(content: dict) -> None:
        content["files"][path.name]["sha256"] = hashlib.sha256(text).hexdigest()

    resealed(eager_engine, seal)
    with pytest.raises(EngineFileError, match=r"norm\.weight is missing"):
        Engine.load(eager_engine, EAGER)


def test_another_dtype_or_device_is_a_usage_error(eager_engine: Path) -> None:
    for settings in ({"dtype": "bfloat16"}, {"device": "cuda"}):
        with pytest.raises(UsageError):
            Engine.load(eager_engine, type(EAGER)(**settings))


def test_a_directory_that_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="cannot be read"):
        Engine.load(tmp_path, EAGER)


def test_a_build_does_not_replace_what_is_no_engine(
    tmp_path: Path, in_cache: None, model: Decoder, source: Imported
) -> None:
    (tmp_path / "precious").write_text("text")
    with pytest.raises(UsageError, match="no engine"):
        build(source, reader(model), EAGER, tmp_path)
    assert contents(tmp_path) == {"precious": b"text"}


# Failing builds


class Failing:
    """Makes the k-th call of any writing system call fail."""

    CALLS = ("pwrite", "fsync", "rename", "ftruncate", "mkdir", "chmod", "open")

    def __init__(self, patch: pytest.MonkeyPatch, at: int, code: int) -> None:
        self.left, self.code, self.fired = at, code, False
        for name in self.CALLS:
            patch.setattr(storage.os, name, self._wrap(getattr(os, name)))
        exchange = storage._exchange
        patch.setattr(storage, "_exchange", self._wrap(exchange))

    def _wrap(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            if self.fired or (function is not storage._exchange and not self._is_of_the_build(args)):
                return function(*args, **kwargs)
            self.left -= 1
            if self.left < 0:
                self.fired = True
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return call

    @staticmethod
    def _is_of_the_build(args: tuple) -> bool:
        return isinstance(args[0], int) or "engine" in os.fspath(args[0])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_build_that_fails_at_any_call_leaves_the_old_engine(
    eager_engine: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    before = contents(eager_engine)
    other = Decoder(2, seed=9)
    network, facts = (whole := imported(other)).network, whole.facts
    completed = False
    for at in range(100):
        source = Imported(network.copy(), facts)
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, code)
            try:
                build(source, reader(other), EAGER, eager_engine).close()
                error = None
            except EngineryError as caught:
                error = caught
        assert failing.fired or error is None
        completed = not failing.fired
        if error is not None and code == errno.ENOSPC:
            assert isinstance(error, ResourceError)
            assert error.exit_code == 4
            assert str(error).startswith("No space left on device: need ")
        siblings = {path.name for path in eager_engine.parent.iterdir()}
        assert all(name == "engine" or name.startswith(".engine.building-") for name in siblings), at
        open_artifact(eager_engine)
        if completed:
            break
        if contents(eager_engine) != before:  # it failed after the exchange: the new engine is whole
            shutil.rmtree(eager_engine)
            for name, data in before.items():
                eager_engine.mkdir(exist_ok=True)
                (eager_engine / name).write_bytes(data)
    assert completed
    assert at > 8
    assert siblings == {"engine"}  # the last build swept what a failing clean-up had left
    assert contents(eager_engine) != before


def test_no_room_is_known_before_anything_is_written(
    eager_engine: Path, model: Decoder, source: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(eager_engine)
    usage = shutil.disk_usage(eager_engine)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(artifact.ArtifactWriter, "write_network", lambda *args: pytest.fail("it began to write"))
    with pytest.raises(ResourceError, match=r"need 0\.02 GiB, have 0\.00 GiB"):
        build(source, reader(model), EAGER, eager_engine)
    assert contents(eager_engine) == before


def test_what_a_killed_build_left_is_swept(eager_engine: Path, model: Decoder, source: Imported) -> None:
    stale = eager_engine.parent / ".engine.building-abc"
    stale.mkdir()
    (stale / "weights").write_bytes(b"half")
    build(source, reader(model), EAGER, eager_engine).close()
    assert not stale.exists()


def test_a_build_beside_another_one_is_left_alone(tmp_path: Path) -> None:
    with storage.replacing(tmp_path / "engine", 1) as first, storage.replacing(tmp_path / "engine", 1) as second:
        assert first.exists()
        assert second.exists()
        for scratch in (first, second):
            (scratch / "engine.json").write_text(scratch.name)
    assert is_engine(tmp_path / "engine")


def test_directories_change_places_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda *args, **kwargs: object())
    storage._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "file").read_text() == "two"
    assert (tmp_path / "two" / "file").read_text() == "one"
