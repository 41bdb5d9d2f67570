"""Files of facts about devices: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from enginery import device_facts


def test_facts_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path))
    path = device_facts.path_of("cpu")
    assert device_facts.read(path) is None
    device_facts.write(path, {"bandwidth": 1.5})
    device_facts.write(path, {"bandwidth": 2.5})
    assert device_facts.read(path) == {"bandwidth": 2.5}
    assert [each.relative_to(tmp_path) for each in tmp_path.rglob("*.json")] == [Path("devices/cpu.json")]


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_what_is_no_json_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    assert device_facts.read(tmp_path / "cpu.json") is None


def test_what_cannot_be_kept_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").mkdir()
    device_facts.write(tmp_path / "cpu.json", [1])
    (tmp_path / "file").touch()
    device_facts.write(tmp_path / "file" / "cpu.json", [1])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cpu.json", "file"]
    with pytest.raises(TypeError):
        device_facts.write(tmp_path / "gpu.json", {1, 2})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cpu.json", "file"]
