from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginery.cli.units import format_bytes, parse_bytes, parse_count
from enginery.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2M", 1 << 21)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text, "--max-model-len") == count


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("1g", 1 << 30), ("1GB", 10**9), ("512", 512), ("0.5 MiB", 1 << 19)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--kv-cache-memory") == size


@pytest.mark.parametrize("text", ["", "many", "-4", "4x", "1e9", "4GB", "٣", "9" * 40])
def test_what_is_no_count_names_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-model-len .* is not a count"):
        parse_count(text, "--max-model-len")


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_one_line(text: str) -> None:
    try:
        size = parse_bytes(text, "--kv-cache-memory")
    except UsageError as error:
        size = 0 if "--kv-cache-memory" in str(error) else -1
    assert size >= 0


def test_sizes_are_printed_in_binary_units() -> None:
    assert [format_bytes(size) for size in (5, 2048, 3 << 20, 5 << 40)] == ["5 B", "2.0 KiB", "3.0 MiB", "5120.0 GiB"]
