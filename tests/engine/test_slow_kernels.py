from __future__ import annotations

import warnings

import pytest

from enginery.engine.engine import warn_of_references
from enginery.errors import EngineryWarning
from enginery.kernels.table import NO_KERNEL, Row


def test_missing_kernels_are_said_with_their_reason() -> None:
    rows = [Row("attention", "cpu", "C++"), Row("packed_linear", "cpu", "reference", "there is no C++ compiler 'g++'")]
    with pytest.warns(EngineryWarning, match=r"so the engine is slow: there is no C\+\+ compiler"):
        warn_of_references(rows)


def test_an_op_that_never_had_a_kernel_is_no_news() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_references([Row("gpt_attention", "cpu", "reference", NO_KERNEL)])
