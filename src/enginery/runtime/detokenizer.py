"""Token ids to text, as they come: no character is split, none is shown before it is certain, nothing is decoded twice
over."""

from __future__ import annotations

from typing import Protocol

_UNKNOWN = "\ufffd"
_MAX_HELD = 3
"""Undecided characters at the end: a UTF-8 character may lack up to three bytes, and some decoders show one mark per
byte."""
_WINDOW = 16
"""Tokens after which the window moves up."""
_MAX_WINDOW = 64
"""Tokens after which it moves although the text never came to rest, so that garbage cannot make decoding quadratic."""


class Tokenizer(Protocol):
    """What the runtime needs of a tokenizer; those of transformers and a thin cover of `tokenizers` have it."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class Detokenizer:
    """The text of one growing sequence.

    A window of the last tokens is decoded at each push, never the whole: its text minus what was shown is new. The
    window starts at a token where the text was at rest (no character pending), and keeps earlier tokens in front of
    the new one, because decoders treat the first token specially (leading spaces).
    """

    __slots__ = ("_decode", "_is_at_rest", "_rest", "_shown", "_skip", "_window")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer.decode
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._shown = ""
        """Text of the window that was returned."""
        self._rest = 0
        """Length of the window when the text was last at rest, before the newest token."""
        self._is_at_rest = True

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token; may be empty."""
        window = self._window
        if len(window) >= _WINDOW:
            self._move_window()
            window = self._window
        if self._is_at_rest:
            self._rest = len(window)
        window.append(token_id)
        text = self._decode(window, skip_special_tokens=self._skip)
        certain = _certain_length(text)
        self._is_at_rest = certain == len(text)
        return self._show(text, certain)

    def flush(self) -> str:
        """What is still held back, when no token follows; an unfinished character becomes U+FFFD."""
        text = self._decode(self._window, skip_special_tokens=self._skip)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        if end <= len(self._shown) or not (self._is_at_rest or text.startswith(self._shown)):
            return ""
        new = text[len(self._shown) : end]
        self._shown = text[:end]
        return new

    def _move_window(self) -> None:
        """Drops tokens up to the last rest but keeps at least one in front, as context of the next."""
        start = self._rest if 0 < self._rest < len(self._window) else 0
        if start == 0 and len(self._window) >= _MAX_WINDOW:
            start = len(self._window) - _WINDOW // 2
        if start == 0:
            return
        self._window = self._window[start:]
        text = self._decode(self._window, skip_special_tokens=self._skip)
        self._shown = text if self._is_at_rest else text[: _certain_length(text)]
        self._rest = 0


def _certain_length(text: str) -> int:
    """Length without the characters at the end that later bytes may still change."""
    if not text.endswith(_UNKNOWN):
        return len(text)
    held = len(text) - len(text.rstrip(_UNKNOWN))
    return len(text) - min(held, _MAX_HELD)
