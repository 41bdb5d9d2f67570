"""Single requests of a session, each followed by a caller of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from enginery.runtime.outputs import RequestOutput
from enginery.runtime.session import Session


class Streams:
    """Steps a session for whoever waits, and keeps what a step brings for the others."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._arrived: dict[str, deque[RequestOutput]] = {}
        self._dropped: deque[str] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Whoever uses the session does so within; other threads wait for it."""
        with self._lock:
            while self._dropped:
                self.close(self._dropped.popleft())
            yield

    def open(self, request_id: str) -> Stream:
        """The stream of a request that was just added."""
        self._arrived[request_id] = deque()
        return Stream(self, request_id)

    def next(self, request_id: str) -> RequestOutput | None:
        """Its next output; None if there will be none: it has ended."""
        with self.turn():
            arrived = self._arrived.get(request_id)
            while arrived is not None and not arrived and self._session.has_work:
                for output in self._session.step():
                    if output.request_id in self._arrived:
                        self._arrived[output.request_id].append(output)
            if not arrived:
                return None
            output = arrived.popleft()
            if output.finished:
                del self._arrived[request_id]
            return output

    def close(self, request_id: str) -> None:
        """Cancels the request if it is still running."""
        with self._lock:
            if self._arrived.pop(request_id, None) is not None:
                self._session.cancel(request_id)

    def drop(self, request_id: str) -> None:
        """Its stream is no more. That may be in the middle of a step, so it is cancelled in the next turn."""
        self._dropped.append(request_id)


class Stream(Iterator[RequestOutput]):
    """Yields what is new of one request, an output a step. Closing it, or letting go of it, cancels the request."""

    def __init__(self, streams: Streams, request_id: str) -> None:
        self.request_id = request_id
        self._streams = streams

    def __next__(self) -> RequestOutput:
        output = self._streams.next(self.request_id)
        if output is None:
            raise StopIteration
        return output

    def close(self) -> None:
        self._streams.close(self.request_id)

    def __del__(self) -> None:
        self._streams.drop(self.request_id)


__all__ = ["Stream", "Streams"]
