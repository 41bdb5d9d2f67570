"""What operators raise within compiled code, kept for whoever runs it.

Compiled regions call operators through C++. That makes another exception of the text of the one that was raised, and an
interrupt an error; with torch 2.11 it prints the text and goes on without a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any


class _Last(threading.local):
    error: BaseException | None = None


_last = _Last()


def keeping(function: Callable) -> Callable:
    """The implementation of an operator, which is remembered if it raises."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _last.error = _last.error or error
            raise

    return call


def take() -> BaseException | None:
    """The first that an operator raised in this thread since the last call, if any did; it is forgotten."""
    error, _last.error = _last.error, None
    return error


__all__ = ["keeping", "take"]
