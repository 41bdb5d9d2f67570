from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.writing import CONFIG, write_model

from enginery.checkpoint import Checkpoint
from enginery.checkpoint.hub import looks_like_hub_id
from enginery.errors import CheckpointError, EngineryError, UnsupportedError


def shards(directory: Path, weight_map: dict[str, object] | None = None) -> Path:
    write_model(directory)
    (directory / "model.safetensors").unlink()
    for number, name in enumerate("ab", start=1):
        save_file({name: torch.full((2,), float(number))}, directory / f"model-{number:05}-of-00002.safetensors")
    listed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": listed if weight_map is None else listed | weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_open_and_read(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randn(5).bfloat16()
    checkpoint = Checkpoint.open(write_model(tmp_path, a=a, b=b))
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors["a"].shape == (3, 4)
    assert torch.equal(checkpoint.read("a"), a)
    assert torch.equal(checkpoint.read("b"), b)
    assert checkpoint.nbytes == 3 * 4 * 4 + 5 * 2
    with pytest.raises(CheckpointError, match="no tensor is named 'c'"):
        checkpoint.read("c")


def test_the_digest_looks_at_files_alone(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    before = Checkpoint.open(directory).digest()
    (directory / "folder.json").mkdir()
    (directory / "dangling.json").symlink_to("nowhere")
    os.mkfifo(directory / "pipe.json")
    assert Checkpoint.open(directory).digest() == before
    (directory / "other.json").write_text("{}")
    assert Checkpoint.open(directory).digest() != before


def test_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(shards(tmp_path)))
    assert checkpoint.read("a").tolist() == [1, 1]
    assert checkpoint.read("b").tolist() == [2, 2]


def test_eos_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG | {"eos_token_id": 3})
    assert Checkpoint.open(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Checkpoint.open(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "five"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'five'"):
        _ = Checkpoint.open(tmp_path).eos_token_ids


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../model.safetensors", "no safetensors file of this directory"),
        ("/etc/passwd", "no safetensors file of this directory"),
        ("sub/model.safetensors", "no safetensors file of this directory"),
        ("..\\model.safetensors", "no safetensors file of this directory"),
        ("https://example.org/model.safetensors", "no safetensors file of this directory"),
        ("model.bin", "no safetensors file of this directory"),
        (7, "no safetensors file of this directory"),
        ("model-00003-of-00002.safetensors", "model-00003-of-00002.safetensors is missing"),
        ("model-00001-of-00002.safetensors", "'b' is listed in model-00001-of-00002.safetensors but is not there"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, shard: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=r"'b'|00003") as caught:
        Checkpoint.open(shards(tmp_path, {"b": shard}))
    assert message in str(caught.value)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"b": torch.zeros(1)}, outside)
    directory = shards(tmp_path / "model")
    (directory / "model-00002-of-00002.safetensors").unlink()
    (directory / "model-00002-of-00002.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the model directory"):
        Checkpoint.open(directory)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    write_model(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert list(Checkpoint.open(snapshot).tensors) == ["a"]


def refuse(directory: Path, kind: type[EngineryError], message: str) -> None:
    with pytest.raises(kind) as caught:
        Checkpoint.open(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    refuse(tmp_path, CheckpointError, "has no config.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refuse(tmp_path, UnsupportedError, "GGUF")
    refuse(tmp_path / "x.gguf", UnsupportedError, "GGUF")
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, UnsupportedError, "LoRA adapter")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refuse(tmp_path, CheckpointError, "has no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refuse(tmp_path, UnsupportedError, "pytorch_model.bin, a pickle")
    refuse(tmp_path / "config.json", CheckpointError, "is a file")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    refuse(tmp_path, CheckpointError, "2 weight files but no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "object is expected"),
        ("{" * 20, "not valid JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested deeper"),
        ('{"model_type": "llama", "n_layer": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"hidden_size": 8}', "model_type is None"),
        ("{}" + " " * (9 << 20), "larger than 8 MiB"),
        ("\xff\xfe", "not valid JSON"),
    ],
    ids=["empty", "list", "cut", "deep", "long integer", "no type", "large", "bytes"],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refuse(tmp_path, CheckpointError, message)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse(tmp_path / "nothing", CheckpointError, "does not exist")
    assert looks_like_hub_id("meta-llama/Llama-3.1-8B")
    assert looks_like_hub_id("gpt2")
    for path in ("./gpt2", "a/b/c", "/abs", "..", "a/..", "", "~x", "a b"):
        assert not looks_like_hub_id(path)


def test_a_hub_id_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("cannot find\nthe requested files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a directory nor in the Hugging Face cache"):
        Checkpoint.open("nobody/nothing")
    directory = write_model(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(directory))
    assert Checkpoint.open("nobody/nothing").directory == directory


def test_the_digest_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    digest = Checkpoint.open(one).digest()
    assert Checkpoint.open(two).digest() == digest  # a copy of a small checkpoint is the same checkpoint
    (two / "tokenizer.json").write_text("{}")
    assert Checkpoint.open(two).digest() != digest
    path, facts = one / "model.safetensors", (one / "model.safetensors").stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert Checkpoint.open(one).digest() != digest

    monkeypatch.setattr("enginery.checkpoint.checkpoint.HASHED_WHOLE", 0)
    checkpoint = Checkpoint.open(one)
    digest = checkpoint.digest()
    assert checkpoint.digest() == digest
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert Checkpoint.open(one).digest() != digest
