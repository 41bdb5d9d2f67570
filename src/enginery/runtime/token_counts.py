"""How often each token occurs in a sequence, for the penalties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class TokenCounts:
    """How often each token occurs in an output, plus the prompt's tokens with count 0. Adding a token is O(1)."""

    __slots__ = ("_counts", "_index", "_tokens", "size")

    def __init__(self, prompt_tokens: Iterable[int], output_tokens: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(prompt_tokens))
        self._index = {token: place for place, token in enumerate(distinct)}
        self.size = len(distinct)
        self._tokens = np.zeros(max(64, 2 * self.size), np.int64)
        self._tokens[: self.size] = distinct
        self._counts = np.zeros(len(self._tokens), np.float32)
        for token in output_tokens:
            self.add(token)

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: self.size]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self.size]

    def add(self, token: int) -> None:
        place = self._index.setdefault(token, self.size)
        if place == self.size:
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[place] = token
            self.size += 1
        self._counts[place] += 1
