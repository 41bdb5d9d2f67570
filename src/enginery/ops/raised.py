"""What operators raise within compiled code, for whoever runs it.

Compiled regions call operators through C++. That makes another exception of the text of the one that was raised, and an
interrupt an error; with torch 2.11 it prints the text and goes on without a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class _Listener(threading.local):
    errors: list[BaseException] | None = None


_listener = _Listener()


def keeping(function: Callable) -> Callable:
    """The implementation of an operator; whoever listens has what it raises."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if _listener.errors is not None:
                _listener.errors.append(error)
            raise

    return call


@contextmanager
def heard() -> Iterator[list[BaseException]]:
    """What operators raise within, in this thread. Empty afterwards: an error holds its tensors as long as it lives."""
    errors: list[BaseException] = []
    _listener.errors = errors
    try:
        yield errors
    finally:
        _listener.errors = None
        errors.clear()


__all__ = ["heard", "keeping"]
