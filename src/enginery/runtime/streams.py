"""Single requests of a session, each followed by a caller of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from enginery.runtime.outputs import RequestOutput
from enginery.runtime.session import Session


class Streams:
    """Steps a session for whoever waits, and keeps what a step brings for the others.

    Attributes:
        turn: held by the thread that uses the session; others wait for it.
    """

    def __init__(self, session: Session) -> None:
        self.turn = threading.RLock()
        self._session = session
        self._arrived: dict[str, deque[RequestOutput]] = {}
        self._dropped: deque[str] = deque()

    def open(self, request_id: str) -> Stream:
        """The stream of a request that was just added."""
        self._arrived[request_id] = deque()
        return Stream(self, request_id)

    def next(self, request_id: str) -> RequestOutput | None:
        """Its next output; None if there will be none: it has ended."""
        with self.turn:
            arrived = self._arrived.get(request_id)
            while arrived is not None and not arrived and self._session.has_work:
                self.cancel_dropped()
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
        with self.turn:
            if self._arrived.pop(request_id, None) is not None:
                self._session.cancel(request_id)

    def drop(self, request_id: str) -> None:
        """Its stream is no more. That may be in the middle of a step, so it is cancelled before the next one."""
        self._dropped.append(request_id)

    def cancel_dropped(self) -> None:
        """To be called before the session is used."""
        while self._dropped:
            self.close(self._dropped.popleft())


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
