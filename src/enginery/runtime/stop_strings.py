"""Finds where a growing text must end."""

from __future__ import annotations


class StopStrings:
    """Watches for the stop string that is completed first, however the text is cut into pieces."""

    __slots__ = ("stops",)

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops

    def find(self, text: str, num_new: int) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first within the last `num_new` characters (of equal ones the
        longest)."""
        best: tuple[int, int, str] | None = None
        for stop in self.stops:
            # An end at or before the known text was looked at before, and passed over (min_tokens).
            start = text.find(stop, max(0, len(text) - num_new - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def num_held(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        held = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:length]):
                    held = length
                    break
        return held


class OutputText:
    """The text of one completion: what is known, what may be shown, and whether a stop string ended it."""

    __slots__ = ("_include_stop", "_shown", "_stops", "is_final", "text")

    def __init__(self, stops: StopStrings, include_stop: bool) -> None:
        self.text = ""
        self.is_final = False
        self._stops = stops
        self._include_stop = include_stop
        self._shown = 0

    def add(self, new: str, may_stop: bool) -> str | None:
        """Appends text; returns the stop string that ends it, if one does."""
        self.text += new
        if not (new and may_stop and self._stops.stops):
            return None
        found = self._stops.find(self.text, len(new))
        if found is None:
            return None
        start, stop = found
        self.text = self.text[: start + len(stop) if self._include_stop else start]
        self.is_final = True
        return stop

    @property
    def visible(self) -> str:
        """The text without an end that a stop string may yet claim."""
        if self.is_final or not self._stops.stops:
            return self.text
        return self.text[: len(self.text) - self._stops.num_held(self.text)]

    def take(self) -> str:
        """What became visible since the last call."""
        visible = self.visible
        new = visible[self._shown :]
        self._shown = len(visible)
        return new
