"""What a session has done and how its memory is used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from enginery.runtime.request import Request
from enginery.runtime.scheduler import Scheduler


@dataclass(slots=True)
class SessionStats:
    """Counters since the session began; the fields of the second half describe the moment of `Session.stats()`."""

    num_steps: int = 0
    num_requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """Finished requests by the finish_reason of their first completion."""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_scheduled_tokens: int = 0
    """Tokens computed, recomputed ones counted again."""
    peak_used_blocks: int = 0
    """Most KV blocks that were in use at once."""
    schedule_seconds: float = 0.0
    batch_seconds: float = 0.0
    engine_seconds: float = 0.0
    sample_seconds: float = 0.0
    settle_seconds: float = 0.0

    num_running: int = 0
    """Sequences."""
    num_waiting: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    num_prefix_hits: int = 0
    """Tokens found there."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_referenced_blocks: int = 0
    """Blocks that would be used if none were shared."""
    num_empty_slots: int = 0
    """Token slots of used blocks that hold nothing."""
    block_size: int = 16

    @property
    def host_seconds(self) -> float:
        """Everything but the engine."""
        return self.schedule_seconds + self.batch_seconds + self.sample_seconds + self.settle_seconds

    @property
    def kv_usage(self) -> float:
        """Used blocks of all, from 0 to 1."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def kv_waste(self) -> float:
        """Part of the used blocks' memory that holds nothing, from 0 to 1."""
        slots = self.num_used_blocks * self.block_size
        return self.num_empty_slots / slots if slots else 0.0

    @property
    def kv_saved_by_sharing(self) -> float:
        """Blocks saved by sharing / blocks without sharing (PagedAttention, arXiv 2309.06180, section 6.3)."""
        referenced = self.num_referenced_blocks
        return 1 - self.num_used_blocks / referenced if referenced else 0.0

    def count_finished(self, request: Request) -> None:
        reason = request.sequences[0].finish_reason or "stop"
        self.finished[reason] = self.finished.get(reason, 0) + 1


def collect(counters: SessionStats, scheduler: Scheduler) -> SessionStats:
    """The counters together with the scheduler's state now. O(running sequences): it may be asked after every step."""
    blocks = scheduler.blocks
    return replace(
        counters,
        finished=dict(counters.finished),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_preemptions=scheduler.num_preemptions,
        num_prefix_queries=scheduler.cache.num_queried_tokens,
        num_prefix_hits=scheduler.cache.num_hit_tokens,
        num_blocks=blocks.num_blocks,
        num_used_blocks=blocks.num_used,
        num_referenced_blocks=sum(len(sequence.blocks) for sequence in scheduler.running),
        num_empty_slots=_empty_slots(scheduler),
        block_size=blocks.block_size,
    )


def _empty_slots(scheduler: Scheduler) -> int:
    """Only blocks behind a sequence's last full one have any; of a block that several share they count once."""
    size = scheduler.limits.block_size
    held: dict[int, int] = {}
    for sequence in scheduler.running:
        full, rest = divmod(sequence.num_computed, size)
        for block in sequence.blocks[full:]:
            held[block], rest = rest, 0
    return size * len(held) - sum(held.values())
