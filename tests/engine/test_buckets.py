"""The shapes that steps on a GPU are padded to."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginery.engine.buckets import Buckets, ladder
from enginery.engine.engine import Engine
from enginery.engine.inputs import StepShape
from enginery.engine.protocol import EngineLimits

LIMITS = EngineLimits(1000, 4096, 2048, 256, 500)


@given(limit=st.integers(1, 5000))
def test_a_ladder_wastes_little(limit: int) -> None:
    sizes = ladder(limit)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == limit
    assert all(b <= max(a + a // 4 + 1, a + 8, 2 * a if a < 8 else 0) for a, b in itertools.pairwise(sizes))


@given(
    tokens=st.integers(1, 3000), sequences=st.integers(1, 256), blocks=st.integers(1, 256), logits=st.integers(1, 300)
)
def test_the_fitting_shape_holds_the_step_and_is_of_its_kind(
    tokens: int, sequences: int, blocks: int, logits: int
) -> None:
    buckets = Buckets.of(LIMITS)
    shape = StepShape(tokens, min(sequences, tokens), blocks, min(logits, tokens))
    found = buckets.fitting(shape)
    if found is None:
        assert tokens > 2048 or shape.logits > 256
        return
    for size in ("tokens", "sequences", "blocks", "logits"):
        assert getattr(shape, size) <= getattr(found, size)
    assert found.is_decode == (shape.is_decode and shape.logits <= shape.sequences)
    sizes = buckets.decode if found.is_decode else buckets.mixed_with(found.sequences)
    assert found.tokens == min(size for size in sizes if size >= tokens), "a smaller one holds it"


@pytest.mark.parametrize("limits", [LIMITS, EngineLimits(10, 64, 1, 1, 4), EngineLimits(10, 10**6, 64, 8, 4)])
def test_shapes_at_open_are_shapes_that_steps_take(limits: EngineLimits) -> None:
    buckets = Buckets.of(limits)
    shapes = list(buckets.at_open())
    assert shapes
    assert len(set(shapes)) == len(shapes)
    assert all(buckets.fitting(shape) == shape for shape in shapes)


@pytest.mark.parametrize(
    ("exact", "padded"),
    [
        ((5000, 1, 20, 1), (5000, 32, 32, 32)),
        ((5000, 32, 33, 3), (5000, 32, 128, 32)),
        ((5000, 33, 20, 33), (5000, 256, 256, 256)),
        ((5000, 2, 20, 40), (5000, 256, 256, 256)),  # logits of a prompt
        ((5000, 2, 20, 300), (5000, 2, 20, 300)),  # more of them
        ((5000, 257, 20, 1), (5000, 257, 20, 1)),  # more than there can be
        ((5000, 2, 257, 2), (5000, 2, 257, 2)),
        ((256, 40, 20, 40), (256, 40, 20, 40)),  # would be decoding
        ((90, 90, 20, 90), (90, 90, 20, 90)),  # is decoding
    ],
)
def test_a_launched_step_has_the_sequences_and_columns_of_captured_ones(
    exact: tuple[int, ...], padded: tuple[int, ...]
) -> None:
    buckets = Buckets.of(LIMITS)
    assert buckets.launched(StepShape(*exact)) == StepShape(*padded)
    captured = {(shape.sequences, shape.blocks) for shape in buckets.at_open()}
    assert exact == padded or (padded[1], padded[2]) in captured


SIZES = (64, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)


@pytest.mark.parametrize("most", [8192, 2048, 2000, 700, 384, 300, 200, 40, 32, 31])
def test_sizes_of_mixed_steps(most: int) -> None:
    mixed = Buckets.of(EngineLimits(1000, 4096, most, 16, 500)).mixed
    end = min(most, 2048)
    assert mixed == (*(size for size in SIZES if size < end), *([end] if end >= 32 else []))


def test_mixed_steps_have_more_tokens_than_sequences() -> None:
    buckets = Buckets.of(LIMITS)
    assert buckets.mixed_with(256) == SIZES[SIZES.index(320) :]
    assert buckets.mixed_with(255) == SIZES[SIZES.index(256) :]
    assert buckets.mixed_with(2048) == ()


def test_steps_on_the_host_are_not_padded(compiled: Engine) -> None:
    assert compiled.limits.step_sizes == ()
