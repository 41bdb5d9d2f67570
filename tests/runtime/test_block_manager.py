from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enginery.errors import EngineError
from enginery.runtime.block_manager import BlockManager
from enginery.runtime.prefix_cache import PrefixCache

SIZE = 4


class BlockOwners(RuleBasedStateMachine):
    """Sequences that take, share, publish and free blocks, beside a plain model of who owns what and what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, SIZE)
        self.cache = PrefixCache(self.blocks)
        self.root = self.cache.root("", "")
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @precondition(lambda self: self.blocks.num_free)
    @rule(tokens=st.lists(st.integers(0, 2), min_size=SIZE, max_size=3 * SIZE))
    def start(self, tokens: list[int]) -> None:
        """A sequence of full blocks: hits are shared, the rest allocated and published."""
        tokens = tokens[: len(tokens) // SIZE * SIZE]
        hits, digests = self.cache.match(self.root, tokens, len(tokens))
        for index, block in enumerate(hits):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        mine = []
        for block in hits:
            self.blocks.share(block)
            mine.append(block)
        for index in range(len(hits), len(tokens) // SIZE):
            if not self.blocks.num_free:
                break
            block = self.blocks.allocate()
            self.content[block] = tuple(tokens[: (index + 1) * SIZE])
            parent = digests[-1] if digests else self.root
            digests.append(self.cache.publish(parent, tokens[index * SIZE : (index + 1) * SIZE], block))
            mine.append(block)
        self.held.append(mine)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.held))
        for block in parent:
            self.blocks.share(block)
        self.held.append(list(parent))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.blocks.free(reversed(self.held.pop(index)))

    @rule()
    def forget(self) -> None:
        self.blocks.drop_cached()

    @invariant()
    def counts_are_owners(self) -> None:
        for block in range(self.blocks.num_blocks):
            assert self.blocks.reference_counts[block] == sum(mine.count(block) for mine in self.held)
        assert self.blocks.num_free + self.blocks.num_used == self.blocks.num_blocks
        assert self.blocks.num_used == len({block for mine in self.held for block in mine})


BlockOwners.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockOwners = BlockOwners.TestCase


def test_freed_cached_blocks_are_reused_oldest_first_and_blank_ones_before() -> None:
    blocks = BlockManager(3, SIZE)
    cache = PrefixCache(blocks)
    root = cache.root("", "")
    taken = [blocks.allocate() for _ in range(3)]
    for token, block in enumerate(taken):
        if token != 1:
            cache.publish(root, [token] * SIZE, block)
    blocks.free([taken[2]])
    blocks.free([taken[0]])
    blocks.free([taken[1]])
    assert blocks.allocate() == taken[1]
    assert blocks.allocate() == taken[2]
    assert cache.match(root, [2] * SIZE, SIZE)[0] == []
    assert cache.match(root, [0] * SIZE, SIZE)[0] == [taken[0]]


def test_misuse_raises() -> None:
    blocks = BlockManager(1, SIZE)
    block = blocks.allocate()
    with pytest.raises(EngineError, match="no KV block"):
        blocks.allocate()
    blocks.free([block])
    with pytest.raises(EngineError, match="twice"):
        blocks.free([block])
    with pytest.raises(EngineError, match="holds nothing"):
        blocks.share(block)


def test_cache_separates_salts_and_adapters_and_positions() -> None:
    blocks = BlockManager(8, SIZE)
    cache = PrefixCache(blocks)
    roots = {cache.root(salt, adapter) for salt in ("", "a", "ab") for adapter in ("", "b", "ab")}
    assert len(roots) == 9
    block = blocks.allocate()
    cache.publish(cache.root("a", ""), [1, 2, 3, 4], block)
    assert cache.match(cache.root("b", ""), [1, 2, 3, 4], 4)[0] == []
    assert cache.match(cache.root("a", ""), [1, 2, 3, 4], 4)[0] == [block]
    assert cache.match(cache.root("a", ""), [1, 2, 3, 4], 3)[0] == []
    assert cache.match(cache.root("a", ""), [9, 9, 9, 9, 1, 2, 3, 4], 8)[0] == []


def test_digest_collision_is_caught_by_comparing_tokens() -> None:
    blocks = BlockManager(2, SIZE)
    cache = PrefixCache(blocks)
    cache.digest = lambda parent, tokens: b"same"  # type: ignore[method-assign]
    root = cache.root("", "")
    cache.publish(root, [1, 1, 1, 1], blocks.allocate())
    assert cache.match(root, [2, 2, 2, 2], 4)[0] == []
    assert len(cache.match(root, [1, 1, 1, 1], 4)[0]) == 1


def test_digests_depend_on_the_process() -> None:
    first, second = (PrefixCache(BlockManager(1, SIZE)) for _ in range(2))
    assert first.root("", "") != second.root("", "")
