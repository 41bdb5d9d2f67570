"""docs/rewriting.md lists probes, features and faults with their tests: each test exists, and none is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from enginery import rewriting

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "rewriting.md").read_text()
WAY_IN = (HERE.parents[1] / "docs" / "add_a_rule.md").read_text()
SECTIONS = {
    "Questions about matching": (10, "test_probes.py"),
    "The features": (22, "test_features.py"),
    "Faults of TensorRT-LLM's module": (13, "test_faults.py"),
}


def names_in(name: str) -> set[str]:
    tree = ast.parse((HERE / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def section(title: str) -> str:
    (found,) = (part for part in re.split(r"^## ", TEXT, flags=re.M) if part.startswith(title))
    return found


def rows(title: str) -> dict[int, list[str]]:
    """The tests of each numbered row."""
    lines = re.findall(r"^\| (\d+) \|(.*)$", section(title), flags=re.M)
    return {int(number): re.findall(r"`(test_\w+)`", line) for number, line in lines}


def test_the_way_in_imports_what_it_uses() -> None:
    imported: set[str] = set()
    for block in re.findall(r"```python\n(.*?)```", WAY_IN, flags=re.S):
        for names in re.findall(r"^(?:>>> )?from enginery\.rewriting import (.*)$", block, flags=re.M):
            imported.update(names.split(", "))
        used = set(rewriting.__all__).intersection(re.findall(r"\w+", block))
        assert used <= imported


@pytest.mark.parametrize("title", SECTIONS)
def test_every_row_names_tests_that_exist(title: str) -> None:
    count, _ = SECTIONS[title]
    files = re.findall(r"`tests/rewriting/(test_\w+\.py)`", section(title))
    known = set().union(*map(names_in, files))
    table = rows(title)
    assert list(table) == list(range(1, count + 1))
    for number, names in table.items():
        assert names, f"row {number} names no test"
        assert known.issuperset(names), f"row {number} names tests that there are not"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_numbered_test_is_in_its_row(title: str) -> None:
    table = rows(title)
    for name in names_in(SECTIONS[title][1]):
        numbered = re.match(r"test_(\d\d)_", name)
        if numbered is not None:
            assert name in table[int(numbered[1])]
