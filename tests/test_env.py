from __future__ import annotations

import re
from pathlib import Path

import pytest

from enginery import env
from enginery.errors import UsageError

PAGE = Path(__file__).parent.parent / "docs" / "environment.md"


def test_the_page_is_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(knob.name, f"`{knob.default}`" if knob.default else "", knob.meaning) for knob in env.KNOBS]


def test_a_knob_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("many", "-3", "1025", "1" * 40):
        monkeypatch.setenv("ENGINERY_THREADS", text)
        with pytest.raises(UsageError, match=f"ENGINERY_THREADS='{text}' is no whole number from 0 to 1024. Unset"):
            env.read_int("ENGINERY_THREADS")


def test_a_knob_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", "")
    assert env.cache_dir() == Path("~/.cache/enginery").expanduser()


def test_the_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", "~no-such-user/x")
    with pytest.raises(UsageError, match="ENGINERY_CACHE='~no-such-user/x' is in the home of nobody here"):
        env.cache_dir()
