"""Decides which tokens the next step computes.

One rule: every sequence has `num_computed` tokens, which catch up with its tokens within a budget of tokens per step;
running sequences first, then waiting ones, by priority and then by arrival. Prefill, chunked prefill, decode, a prefix
hit and recomputation after preemption are all the same thing: tokens that are known but not computed.

Invariants
- A waiting sequence owns no block. A running one owns the blocks of its computed tokens, plus those of the tokens
  scheduled now, or cut off from them for the next step.
- A block that several own is only read; before a sequence writes to it, the sequence gets a copy of its own.
- When memory runs out, the last running sequence in order gives up its blocks and computes again later. The first in
  order therefore always advances, and admission never skips the head of the queue: nobody starves within a priority.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from enginery.engine.protocol import EngineLimits
from enginery.runtime.block_manager import BlockManager
from enginery.runtime.prefix_cache import PrefixCache
from enginery.runtime.request import Sequence, Status

MANY_DECODING = 128
"""Sequences of a step beside which prompts are cut to fit its padded size."""
MOST_CUT = 4
"""Tokens that may wait a step for each row of padding that is saved."""
LEAST_PROMPT = 64
"""Tokens of prompts that such a step keeps."""

_ORDER = attrgetter("order")


class BlockChange(NamedTuple):
    """What a step changes in the block table of one sequence."""

    sequence: Sequence
    first: int
    """Blocks from here on are new in the table; 0: so is the sequence in its row."""
    copy: tuple[int, int] | None
    """KV block to copy before the step, (source, destination)."""


@dataclass(slots=True)
class Schedule:
    """The work of one step. Lists side by side: most sequences of most steps compute one token and change nothing."""

    sequences: list[Sequence] = field(default_factory=list)
    num_new: list[int] = field(default_factory=list)
    """Tokens that each of them computes."""
    changes: list[BlockChange] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_logits: int = 0
    """Rows of logits for prompt_logprobs."""

    def each(self) -> list[Schedule]:
        """The share of each sequence, to be run by itself."""
        return [
            Schedule([sequence], [num_new], [change for change in self.changes if change.sequence is sequence], num_new)
            for sequence, num_new in zip(self.sequences, self.num_new, strict=True)
        ]


class Scheduler:
    """Owns the queue, the running sequences and their blocks. Knows nothing of devices, sampling or text."""

    def __init__(self, limits: EngineLimits, *, prefix_caching: bool = True, max_prompt_logits: int = 0) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.num_blocks, limits.block_size)
        self.cache = PrefixCache(self.blocks, enabled=prefix_caching)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_prompt_logits = max_prompt_logits or limits.max_num_tokens
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        # The head that did not fit and the free blocks of that moment: no use in asking the cache again before some
        # came free.
        self._blocked: Sequence | None = None
        self._blocked_at = 0

    # ---- the step

    def schedule(self) -> Schedule:
        """Chooses tokens, takes their blocks, and preempts or admits sequences to do so."""
        schedule = Schedule()
        before = self.num_preemptions
        self._schedule_running(schedule)
        if self.num_preemptions == before:
            self._admit(schedule)
        if not schedule.sequences and self.waiting and not any(sequence.num_pending for sequence in self.running):
            self._make_room_for_head()
            self._admit(schedule)
        self._cut_to_size(schedule)
        return schedule

    def advance(self, schedule: Schedule) -> None:
        """It has been launched: whatever is launched later finds its tokens computed."""
        for sequence, num_new in zip(schedule.sequences, schedule.num_new, strict=True):
            sequence.num_computed += num_new

    def publish(self, schedule: Schedule) -> None:
        """The step was launched: blocks that are full of known tokens become findable, those of a prompt at once, later
        ones and those that were cut off a chunk when the sequence takes its next block."""
        for sequence, _, _ in schedule.changes:
            if sequence.status is Status.RUNNING:
                self._publish(sequence)

    def _schedule_running(self, schedule: Schedule) -> None:
        """Running sequences in order, each at least one token while the budget lasts."""
        budget = self.limits.max_num_tokens
        sequences, num_new = schedule.sequences, schedule.num_new
        for index, sequence in enumerate(self.running, 1):  # which loses its last ones where memory runs out
            if budget == 0:
                break
            length = len(sequence.token_ids) + sequence.num_pending
            num_computed = sequence.num_computed
            if length >= sequence.max_length:
                continue  # the pending token is its last
            num_tokens = length - num_computed
            if num_tokens > 1:
                # Leave every later sequence its next token, so that a long prompt does not stall those that stream.
                num_tokens = max(1, min(num_tokens, budget - (len(self.running) - index)))
                num_tokens = self._within_prompt_logits(schedule, sequence, num_tokens)
            if num_tokens <= 0:
                continue
            if num_computed + num_tokens > sequence.num_writable and not self._take_blocks(
                schedule, sequence, num_tokens
            ):
                continue
            sequences.append(sequence)
            num_new.append(num_tokens)
            budget -= num_tokens
        schedule.num_tokens = self.limits.max_num_tokens - budget

    def _admit(self, schedule: Schedule) -> None:
        """Waiting sequences in order, until the first that does not fit."""
        while self.waiting and schedule.num_tokens < self.limits.max_num_tokens:
            sequence = self.waiting[0]
            if sequence.num_pending or not self._has_rows_for(sequence):
                return
            if schedule.sequences and sequence is self._blocked and self.blocks.num_free <= self._blocked_at:
                return
            hits, digests = self._find_prefix(sequence)
            # A running sequence may need a block soon: keep one for each, or admission would preempt itself in the
            # next steps.
            reserve = len(self.running) if schedule.sequences else 0
            revived = sum(self.blocks.reference_counts[block] == 0 for block in hits)
            needed = self.blocks.blocks_for(sequence.num_tokens) - len(hits) + revived
            if needed + reserve > self.blocks.num_free:
                self._blocked, self._blocked_at = sequence, self.blocks.num_free
                return
            computed = len(hits) * self.limits.block_size
            num_tokens = min(sequence.num_tokens - computed, self.limits.max_num_tokens - schedule.num_tokens)
            num_tokens = self._within_prompt_logits(schedule, sequence, num_tokens)
            if num_tokens <= 0:
                return
            self._start(sequence, hits, digests)
            if not self._take_blocks(schedule, sequence, num_tokens):
                return
            schedule.sequences.append(sequence)
            schedule.num_new.append(num_tokens)
            schedule.num_tokens += num_tokens

    def _cut_to_size(self, schedule: Schedule) -> None:
        """Shortens the chunk of a prompt beside many decoding sequences, so that the step needs no padding.

        What is cut off rides along in the next step, for less than padding to the next size costs here, if it is not
        much more than that. Beside few a prompt is never cut: there may be no such step, and its remainder would cost
        one.
        """
        num_new, sizes = schedule.num_new, self.limits.step_sizes
        if not sizes or not max(len(num_new), sizes[0]) < schedule.num_tokens <= sizes[-1]:
            return
        place = bisect_left(sizes, schedule.num_tokens)
        size, padding = sizes[place - 1], sizes[place] - schedule.num_tokens
        excess, decoding = schedule.num_tokens - size, num_new.count(1)
        if decoding < MANY_DECODING or size - decoding < LEAST_PROMPT or excess > MOST_CUT * padding:
            return
        index = next((i for i in reversed(range(len(num_new))) if num_new[i] > excess), None)
        if index is None:
            return
        num_new[index] -= excess
        schedule.num_tokens = size
        sequence = schedule.sequences[index]
        if sequence.request.wants_prompt_logprobs and sequence.is_prefilling:
            schedule.num_prompt_logits -= excess

    def _make_room_for_head(self) -> None:
        """Nothing can run but parked beams hold memory: they yield it, last first, to the head of the queue."""
        while self.running:
            head = self.waiting[0]
            self.preempt(self.running[-1])
            if self.blocks.blocks_for(head.num_tokens) <= self.blocks.num_free and self._has_rows_for(head):
                return

    def _has_rows_for(self, sequence: Sequence) -> bool:
        """A row, and for a prompt to be forked one for each completion, so that they share its blocks from the
        start."""
        free = len(self._free_rows)
        if free == 0:
            return False
        promised = sum(s.request.num_forks for s in self.running if not s.request.is_prefilled)
        forks = 0 if sequence.request.is_prefilled else sequence.request.num_forks
        return min(1 + forks, self.limits.max_num_seqs) <= free - promised

    # ---- memory

    def _take_blocks(self, schedule: Schedule, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a sequence the blocks of its next tokens; False if that cost the sequence itself its place."""
        size = self.limits.block_size
        blocks = sequence.blocks
        start = sequence.num_computed
        end = start + num_tokens
        while self._missing_blocks(sequence, start, end) > self.blocks.num_free:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        first = len(blocks) if sequence.num_writable else 0
        copy = None
        if start % size and self.blocks.is_shared(blocks[start // size]):
            copy = (blocks[start // size], self.blocks.allocate())
            self.blocks.free((copy[0],))
            blocks[start // size] = copy[1]
        while len(blocks) * size < end:
            blocks.append(self.blocks.allocate())
        sequence.num_writable = len(blocks) * size
        schedule.changes.append(BlockChange(sequence, first, copy))
        return True

    def _missing_blocks(self, sequence: Sequence, start: int, end: int) -> int:
        size = self.limits.block_size
        copies = bool(start % size) and self.blocks.is_shared(sequence.blocks[start // size])
        return self.blocks.blocks_for(end) - len(sequence.blocks) + copies

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Cached blocks of its tokens. The last token is always computed: its logits are wanted."""
        request = sequence.request
        if not (request.reads_prefix_cache or request.is_prefilled):
            return [], []
        return self.cache.match(request.cache_root, sequence.token_ids, sequence.num_tokens - 1)

    def _publish(self, sequence: Sequence) -> None:
        if not self.cache.enabled:
            return
        size = self.limits.block_size
        digests = sequence.digests
        for index in range(len(digests), min(sequence.num_computed, len(sequence.token_ids)) // size):
            parent = digests[-1] if digests else sequence.request.cache_root
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            digests.append(self.cache.publish(parent, tokens, sequence.blocks[index]))

    def _within_prompt_logits(self, schedule: Schedule, sequence: Sequence, num_tokens: int) -> int:
        """As many of these tokens as the step has rows of logits for, where prompt_logprobs asks for them."""
        if sequence.request.wants_prompt_logprobs and sequence.is_prefilling:
            num_tokens = min(num_tokens, self._max_prompt_logits - schedule.num_prompt_logits)
            schedule.num_prompt_logits += num_tokens
        return num_tokens

    # ---- the life of a sequence

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_ORDER)

    def _start(self, sequence: Sequence, hits: list[int], digests: list[bytes]) -> None:
        self.waiting.pop(0)
        for block in hits:
            self.blocks.share(block)
        sequence.blocks = hits
        sequence.digests = digests
        sequence.num_computed = len(hits) * self.limits.block_size
        self.cache.count(sequence.num_tokens, sequence.num_computed)
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = sequence.num_computed
        self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.num_writable = 0
        insort(self.running, sequence, key=_ORDER)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child continues the parent's computed tokens: it shares every block, the partial last one too.

        Without a free row the child waits instead, owning nothing, and finds the common prefix in the cache.
        """
        if parent.status is not Status.RUNNING or not self._free_rows:
            self.add(child)
            return
        for block in parent.blocks:
            self.blocks.share(block)
        child.blocks = list(parent.blocks)
        child.digests = list(parent.digests)
        child.num_computed = parent.num_computed
        parent.num_writable = 0
        self._run(child)

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks; it computes again when it is admitted again."""
        self.num_preemptions += 1
        sequence.request.metrics.num_preemptions += 1
        is_parked = sequence.num_computed == sequence.num_tokens
        self._leave(sequence)
        sequence.num_computed = 0
        if is_parked:
            sequence.status = Status.PARKED
        else:
            self.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Removes a sequence from wherever it is and gives back what it owns."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is Status.WAITING:
            del self.waiting[self._position(self.waiting, sequence)]
        sequence.status = Status.FINISHED

    def _leave(self, sequence: Sequence) -> None:
        self._publish(sequence)
        del self.running[self._position(self.running, sequence)]
        self.blocks.free(reversed(sequence.blocks))
        self._free_rows.append(sequence.row)
        sequence.blocks = []
        sequence.digests = []
        sequence.row = -1

    @staticmethod
    def _position(ordered: list[Sequence], sequence: Sequence) -> int:
        index = bisect_left(ordered, sequence.order, key=_ORDER)
        while ordered[index] is not sequence:
            index += 1
        return index
