"""Finds KV blocks that already hold the beginning of a sequence.

A full block is known by a digest of everything that its content depends on: the digest of the block before it, its
tokens, and for the first block the request's salt and adapter. The digest is keyed with a secret of the process, so a
caller cannot search for collisions; tokens and parent are compared on a hit all the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as TokenSequence
from hashlib import blake2b
from struct import Struct, pack
from typing import NamedTuple

from enginery.runtime.block_manager import BlockManager

DIGEST_SIZE = 32


class _Entry(NamedTuple):
    block: int
    parent: bytes
    tokens: tuple[int, ...]


class PrefixCache:
    """Content of full blocks, of owned and of freed ones, until they are reused. O(blocks of the request) per
    lookup."""

    def __init__(self, blocks: BlockManager, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._blocks = blocks
        self._keyed = blake2b(key=os.urandom(DIGEST_SIZE), digest_size=DIGEST_SIZE)
        self._pack = Struct(f"<{blocks.block_size}q").pack
        self._entries: dict[bytes, _Entry] = {}
        self._digest_of: dict[int, bytes] = {}
        blocks.on_reuse = self._evict

    def __len__(self) -> int:
        return len(self._entries)

    def root(self, salt: str, adapter: str) -> bytes:
        """The parent digest of a sequence's first block: sequences of another salt or adapter never meet."""
        parts = (salt.encode(errors="surrogatepass"), adapter.encode(errors="surrogatepass"))
        return self._hash(b"".join(pack("<Q", len(part)) + part for part in parts))

    def digest(self, parent: bytes, tokens: TokenSequence[int]) -> bytes:
        """Of a full block."""
        return self._hash(parent + self._pack(*tokens))

    def match(self, root: bytes, tokens: TokenSequence[int], max_tokens: int) -> tuple[list[int], list[bytes]]:
        """Blocks, and their digests, that hold the longest known prefix of `tokens[:max_tokens]`. Takes no
        ownership."""
        size = self._blocks.block_size
        found: list[int] = []
        digests: list[bytes] = []
        parent = root
        if self.enabled:
            for start in range(0, max_tokens - size + 1, size):
                chunk = tuple(tokens[start : start + size])
                digest = self.digest(parent, chunk)
                entry = self._entries.get(digest)
                if entry is None or entry.tokens != chunk or entry.parent != parent:
                    break
                found.append(entry.block)
                digests.append(digest)
                parent = digest
        return found, digests

    def publish(self, parent: bytes, tokens: TokenSequence[int], block: int) -> bytes:
        """Makes a full, computed, owned block findable and returns its digest. The first block of a content stays the
        known one."""
        digest = self.digest(parent, tokens)
        if digest not in self._entries and block not in self._digest_of:
            self._entries[digest] = _Entry(block, parent, tuple(tokens))
            self._digest_of[block] = digest
            self._blocks.mark_cached(block)
        return digest

    def count(self, queried: int, hit: int) -> None:
        self.num_queried_tokens += queried
        self.num_hit_tokens += hit

    def _evict(self, block: int) -> None:
        del self._entries[self._digest_of.pop(block)]

    def _hash(self, data: bytes) -> bytes:
        hasher = self._keyed.copy()
        hasher.update(data)
        return hasher.digest()
