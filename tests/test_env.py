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
    monkeypatch.setenv("ENGINERY_THREADS", "many")
    with pytest.raises(UsageError, match=r"ENGINERY_THREADS='many' is not an integer\. Unset ENGINERY_THREADS"):
        env.read_int("ENGINERY_THREADS")
