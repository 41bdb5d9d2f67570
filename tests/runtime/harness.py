"""What the tests of the runtime share: small sessions on a fake engine, and the invariants that must hold between
steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

from enginery.engine.protocol import EngineLimits
from enginery.runtime.fake_engine import FakeEngine
from enginery.runtime.outputs import RequestOutput
from enginery.runtime.request import Status
from enginery.runtime.session import Session, SessionConfig

VOCABULARY = 61


def make_session(
    *,
    num_blocks: int = 512,
    block_size: int = 4,
    max_num_tokens: int = 1024,
    max_num_seqs: int = 64,
    max_model_len: int = 96,
    vocab_size: int = VOCABULARY,
    step_sizes: tuple[int, ...] = (),
    tokenizer: Any = None,
    logits_of: Any = None,
    **config: Any,
) -> Session:
    limits = EngineLimits(vocab_size, max_model_len, max_num_tokens, max_num_seqs, num_blocks, block_size, step_sizes)
    return Session(FakeEngine(limits, logits_of=logits_of), tokenizer, SessionConfig(**{"seed": 1, **config}))


def check_invariants(session: Session) -> None:
    """Reference counts are owners, free + used = total, queues are ordered and disjoint, rows are distinct."""
    scheduler = session.scheduler
    blocks = scheduler.blocks
    owners = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert blocks.reference_counts == [owners[block] for block in range(blocks.num_blocks)]
    assert blocks.num_free + blocks.num_used == blocks.num_blocks
    assert blocks.num_used == len(owners)
    stats = session.stats()
    assert stats.num_referenced_blocks == owners.total()
    assert stats.num_empty_slots == len(owners) * blocks.block_size - _held(session).total()
    assert set(blocks._blank).isdisjoint(blocks._cached_free)
    for queue, status in ((scheduler.running, Status.RUNNING), (scheduler.waiting, Status.WAITING)):
        assert [s.order for s in queue] == sorted(s.order for s in queue)
        assert all(sequence.status is status for sequence in queue)
    assert not any(sequence.blocks for sequence in scheduler.waiting)
    rows = [sequence.row for sequence in scheduler.running]
    assert sorted(rows + scheduler._free_rows) == list(range(scheduler.limits.max_num_seqs))
    for sequence in scheduler.running:
        assert len(sequence.blocks) * blocks.block_size >= sequence.num_computed
        assert 0 <= sequence.num_computed <= sequence.num_tokens
        assert sequence.num_writable in (0, len(sequence.blocks) * blocks.block_size)
        written = sequence.blocks[sequence.num_computed // blocks.block_size :] if sequence.num_writable else ()
        assert not any(map(blocks.is_shared, written)), "a block that is written to has other readers"


def _held(session: Session) -> Counter[int]:
    """Tokens in each block, which several sequences may share."""
    size = session.scheduler.limits.block_size
    held: Counter[int] = Counter()
    for sequence in session.scheduler.running:
        for index, block in enumerate(sequence.blocks):
            held[block] = max(held[block], min(size, max(0, sequence.num_computed - index * size)))
    return held


def check_idle(session: Session) -> None:
    check_invariants(session)
    assert not session.has_work
    assert session.scheduler.blocks.num_used == 0
    assert not session.scheduler.running
    assert not session.scheduler.waiting


def step_checked(session: Session) -> list[RequestOutput]:
    """A step, then the invariants; memory that nobody may read any more is poisoned."""
    outputs = session.step()
    check_invariants(session)
    engine = session.engine
    assert isinstance(engine, FakeEngine)
    engine.poison(session.scheduler.blocks._blank)
    return outputs


def run_to_end(session: Session, max_steps: int = 20_000) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the final outputs by request id."""
    final: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not session.has_work:
            break
        for output in step_checked(session):
            assert output.request_id not in final, "a finished request reported again"
            if output.finished:
                final[output.request_id] = output
    check_idle(session)
    return final


def token_streams(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]
