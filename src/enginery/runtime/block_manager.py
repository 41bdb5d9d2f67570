"""KV blocks: who owns which, which are free, which freed ones can still be hit.

A block is a number; its memory lives in the engine. A block is owned by as many sequences as its reference count says.
A freed block that the prefix cache knows keeps its content until it is reused, least recently freed first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from enginery.errors import EngineError


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens. Allocating, sharing and freeing a block are O(1)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reference_counts = [0] * num_blocks
        self.on_reuse: Callable[[int], None] | None = None
        """Told of a cached block whose content is about to be lost."""
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()
        self._is_cached = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached_free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """A block with one owner; blank ones first, then the cached one that was freed longest ago.

        Raises:
            EngineError: none is free. Callers ask `num_free` first.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._cached_free:
            block, _ = self._cached_free.popitem(last=False)
            self._forget(block)
        else:
            raise EngineError("no KV block is free")
        self.reference_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner. A free block that is still cached comes back to life."""
        if self.reference_counts[block] == 0:
            if block not in self._cached_free:
                raise EngineError(f"KV block {block} is free and holds nothing")
            del self._cached_free[block]
        self.reference_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One owner less for each. Give the blocks of a sequence last first, so that prefixes outlive their tails."""
        for block in blocks:
            count = self.reference_counts[block] - 1
            if count < 0:
                raise EngineError(f"KV block {block} was freed twice")
            self.reference_counts[block] = count
            if count == 0:
                self._release(block)

    def is_shared(self, block: int) -> bool:
        return self.reference_counts[block] > 1

    def mark_cached(self, block: int) -> None:
        """The prefix cache knows the content of this (owned) block."""
        self._is_cached[block] = 1

    def drop_cached(self) -> None:
        """Forgets the content of all free blocks."""
        for block in list(self._cached_free):
            del self._cached_free[block]
            self._forget(block)
            self._blank.append(block)

    def _release(self, block: int) -> None:
        if self._is_cached[block]:
            self._cached_free[block] = None
        else:
            self._blank.append(block)

    def _forget(self, block: int) -> None:
        self._is_cached[block] = 0
        if self.on_reuse is not None:
            self.on_reuse(block)
