"""Attention of the CPU against float64; one token gives the same bits in decoding, chunked and whole prefill."""

from __future__ import annotations

import random as stdlib_random
from dataclasses import dataclass, replace

import pytest
import torch
from tests.kernels.cpu import DTYPES, TOLERANCE, relative_error, require_kernels

from enginery import ops
from enginery.ops import reference


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_kernels()


@dataclass
class Batch:
    """Arguments of paged_attention. Slots that no sequence owns hold NaN, unused table entries a wild id."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor

    def arguments(self) -> list[torch.Tensor]:
        return list(vars(self).values())

    def copy(self) -> Batch:
        return Batch(*(tensor.clone() for tensor in self.arguments()))

    def in_float64(self) -> Batch:
        """The same for the reference, which may read slots that it masks later: no NaN."""
        return Batch(*(t.double().nan_to_num(0.0) if t.is_floating_point() else t.clone() for t in self.arguments()))


def make_batch(
    lengths: list[int], new: list[int], heads: tuple[int, int], sizes: tuple[int, int], block: int, dtype: torch.dtype,
    padding: int = 0,
) -> Batch:  # fmt: skip
    needed = [-(-length // block) for length in lengths]
    blocks = torch.randperm(sum(needed) + 3).tolist()
    (queries, keys), (key_size, value_size) = heads, sizes
    key_cache = torch.full((len(blocks), keys, block, key_size), torch.nan, dtype=dtype)
    value_cache = torch.full((len(blocks), keys, block, value_size), torch.nan, dtype=dtype)
    tables = torch.full((len(lengths), max(needed) + 2), -(10**9), dtype=torch.int32)
    slots, starts = [], [0]
    for sequence, (length, count) in enumerate(zip(lengths, new, strict=True)):
        tables[sequence, : needed[sequence]] = torch.tensor(blocks[: needed[sequence]], dtype=torch.int32)
        own = [blocks[token // block] * block + token % block for token in range(length)]
        blocks = blocks[needed[sequence] :]
        for slot in own[: length - count]:
            key_cache[slot // block, :, slot % block] = torch.randn(keys, key_size).to(dtype)
            value_cache[slot // block, :, slot % block] = torch.randn(keys, value_size).to(dtype)
        slots += own[length - count :]
        starts.append(starts[-1] + count)
    tokens = len(slots) + padding
    return Batch(
        torch.randn(tokens, queries, key_size).to(dtype),
        torch.randn(tokens, keys, key_size).to(dtype),
        torch.randn(tokens, keys, value_size).to(dtype),
        key_cache,
        value_cache,
        torch.tensor(slots + [-1] * padding, dtype=torch.int64),
        tables,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
    )


FEATURES = ["window", "softcap", "sinks", "alibi_slopes"]


def options(names: tuple[str, ...], heads: int, dtype: torch.dtype) -> dict[str, object]:
    every = {
        "window": 21,
        "softcap": 4.0,
        "sinks": torch.randn(heads).to(dtype),
        "alibi_slopes": torch.rand(heads) * 0.3,
    }
    return {name: every[name] for name in names}


def widened(named: dict[str, object]) -> dict[str, object]:
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in named.items()}


PAIRS = [(), *((name,) for name in FEATURES), *((a, b) for i, a in enumerate(FEATURES) for b in FEATURES[i + 1 :])]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_features_pairwise_on_a_mixed_batch(names: tuple[str, ...], dtype: torch.dtype) -> None:
    batch = make_batch([5, 77, 0, 130, 64, 1], [5, 1, 0, 49, 1, 1], (6, 2), (24, 40), 16, dtype, padding=2)
    named = options(names, 6, dtype)
    wide = batch.in_float64()
    output = ops.paged_attention(*batch.arguments(), 0.3, **named)
    expected = reference(ops.paged_attention)(*wide.arguments(), 0.3, **widened(named))
    assert relative_error(output, expected) < TOLERANCE[dtype]
    assert torch.equal(output[-2:], torch.zeros_like(output[-2:]))
    assert torch.equal(batch.key_cache.double().nan_to_num(0.0), wide.key_cache)
    assert torch.equal(batch.value_cache.double().nan_to_num(0.0), wide.value_cache)


def test_random_shapes() -> None:
    random = stdlib_random.Random(torch.seed())
    for _ in range(25):
        dtype, keys = random.choice(DTYPES), random.choice([1, 2, 3])
        heads = (keys * random.choice([1, 2, 4, 7, 33]), keys)
        key_size = random.choice([1, 8, 20, 64, 80, 128, 272])
        sizes = (key_size, random.choice([key_size, 5, 16, 48, 72]))
        new = [random.choice([0, 1, 1, 3, 40, 90]) for _ in range(random.randint(1, 4))]
        lengths = [count and count + random.choice([0, 0, 17, 100, 200]) for count in new]
        batch = make_batch(lengths, new, heads, sizes, random.choice([1, 4, 5, 16, 32]), dtype, random.choice([0, 3]))
        named = options(tuple(random.sample(FEATURES, random.randint(0, 4))), heads[0], dtype)
        wide = batch.in_float64()
        output = ops.paged_attention(*batch.arguments(), key_size**-0.5, **named)
        expected = reference(ops.paged_attention)(*wide.arguments(), key_size**-0.5, **widened(named))
        assert relative_error(output, expected) < TOLERANCE[dtype], (dtype, heads, sizes, lengths, new, named)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("names", [(), ("window",), ("softcap", "sinks"), ("alibi_slopes", "window")], ids="+".join)
def test_attention_over_one_sequence(names: tuple[str, ...], causal: bool, dtype: torch.dtype) -> None:
    query = torch.randn(150, 6, 32).to(dtype)
    key, value = (torch.randn(2, 150, size).to(dtype).transpose(0, 1) for size in (32, 48))
    named = options(names, 6, dtype)
    output = ops.attention(query, key, value, 0.2, causal, **named)
    expected = reference(ops.attention)(query.double(), key.double(), value.double(), 0.2, causal, **widened(named))
    assert relative_error(output, expected) < TOLERANCE[dtype]


def test_strides_do_not_matter() -> None:
    batch = make_batch([30, 9], [12, 1], (4, 2), (32, 32), 16, torch.float32)
    expected = ops.paged_attention(*batch.copy().arguments(), 0.2)
    packed = torch.cat([batch.query, batch.key, batch.value], dim=1)
    query, key, value = packed.split([4, 2, 2], dim=1)
    pool = torch.stack([batch.key_cache, batch.value_cache], dim=1)
    views = replace(batch, query=query, key=key, value=value, key_cache=pool[:, 0], value_cache=pool[:, 1])
    assert torch.equal(ops.paged_attention(*views.arguments(), 0.2), expected)
    last = batch.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.paged_attention(*replace(batch, query=last).arguments(), 0.2), expected)
    assert torch.equal(pool[:, 0].nan_to_num(0.0), batch.key_cache.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("window",), ("softcap", "sinks"), ("alibi_slopes",)], ids="+".join)
def test_decode_and_any_chunking_give_the_same_bits(names: tuple[str, ...], dtype: torch.dtype) -> None:
    length, heads, block = 203, (8, 2), 16
    named = options(names, 8, dtype)
    tokens = make_batch([length], [length], heads, (40, 48), block, dtype)
    outputs = []
    for chunk in (length, 100, 7, 1):
        caches = {"key_cache": tokens.key_cache.clone(), "value_cache": tokens.value_cache.clone()}
        parts = []
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            part = replace(
                tokens, query=tokens.query[begin:end], key=tokens.key[begin:end], value=tokens.value[begin:end],
                slot_mapping=tokens.slot_mapping[begin:end],
                query_start=torch.tensor([0, end - begin], dtype=torch.int32),
                seq_lens=torch.tensor([end], dtype=torch.int32), **caches,
            )  # fmt: skip
            parts.append(ops.paged_attention(*part.arguments(), 0.2, **named))
        outputs.append(torch.cat(parts))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


def test_a_sequence_has_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    batch = make_batch([80, 33, 150, 7], [1, 33, 60, 1], (8, 4), (64, 64), 16, torch.bfloat16)
    together = ops.paged_attention(*batch.copy().arguments(), 0.125)
    threads = torch.get_num_threads()
    try:
        for sequence in range(4):
            torch.set_num_threads(sequence + 1)
            begin, end = batch.query_start[sequence : sequence + 2].tolist()
            alone = replace(
                batch.copy(), query=batch.query[begin:end], key=batch.key[begin:end], value=batch.value[begin:end],
                slot_mapping=batch.slot_mapping[begin:end], block_tables=batch.block_tables[sequence : sequence + 1],
                query_start=torch.tensor([0, end - begin], dtype=torch.int32),
                seq_lens=batch.seq_lens[sequence : sequence + 1],
            )  # fmt: skip
            assert torch.equal(ops.paged_attention(*alone.arguments(), 0.125), together[begin:end])
    finally:
        torch.set_num_threads(threads)


def test_blocks_before_the_window_may_be_gone() -> None:
    batch = make_batch([100], [1], (2, 1), (16, 16), 16, torch.float32)
    expected = ops.paged_attention(*batch.copy().arguments(), 0.3, window=20)
    gone = batch.copy()
    gone.key_cache[batch.block_tables[0, :5].long()] = torch.nan
    gone.value_cache[batch.block_tables[0, :5].long()] = torch.nan
    gone.block_tables[0, :5] = -1
    assert torch.equal(ops.paged_attention(*gone.arguments(), 0.3, window=20), expected)


def test_out_of_range_metadata_is_refused_before_anything_is_written() -> None:
    def broken(**changes: torch.Tensor) -> Batch:
        return replace(make_batch([30, 20], [4, 1], (2, 1), (16, 16), 16, torch.float32), **changes)

    int32 = torch.int32
    refused = [
        (broken(slot_mapping=torch.tensor([1, 2, 3, 10**6, 5])), "slot 1000000 is outside"),
        (broken(block_tables=torch.tensor([[0, 99], [1, 2]], dtype=int32)), "block 99 of sequence 0"),
        (broken(block_tables=torch.tensor([[0, -1], [1, 2]], dtype=int32)), "block -1 of sequence 0"),
        (broken(block_tables=torch.tensor([[0], [1]], dtype=int32)), "exceeds its table"),
        (broken(seq_lens=torch.tensor([30, 2**31 - 1], dtype=int32)), "exceeds its table"),
        (broken(seq_lens=torch.tensor([3, 20], dtype=int32)), "4 new tokens but length 3"),
        (broken(query_start=torch.tensor([0, 4, 6], dtype=int32)), "query_start"),
        (broken(query_start=torch.tensor([0, 4, 3], dtype=int32)), "query_start"),
        (broken(query_start=torch.tensor([-2, 4, 5], dtype=int32)), "query_start"),
        (broken(query_start=torch.tensor([0, 4, 5])), "int32"),
        (broken(slot_mapping=torch.tensor([1, 2, 3, 4, 5], dtype=int32)), "int64"),
        (broken(slot_mapping=torch.tensor([1, 2])), "slot_mapping"),
        (broken(key=torch.randn(5, 1, 8)), "size 16"),
        (broken(value=torch.randn(5, 2, 16)), "heads"),
        (broken(query=torch.randn(5, 2, 16).half()), "another dtype"),
        (broken(query=torch.randn(5, 2, 16)[:4]), "as many tokens"),
        (broken(key_cache=torch.randn(9, 1, 16, 32)[..., ::2]), "contiguous"),
        (broken(value_cache=torch.randn(2, 1, 16, 16)), "different blocks"),
    ]
    for batch, message in refused:
        before = batch.key_cache.clone()
        with pytest.raises(RuntimeError, match=message):
            ops.paged_attention(*batch.arguments(), 0.3)
        assert torch.equal(batch.key_cache.nan_to_num(0.0), before.nan_to_num(0.0))
    whole = make_batch([8], [8], (2, 1), (16, 16), 16, torch.float32)
    for named in ({"window": 0}, {"softcap": -1.0}, {"sinks": torch.randn(3)}, {"alibi_slopes": torch.randn(1)}):
        with pytest.raises(RuntimeError, match=next(iter(named))):
            ops.paged_attention(*whole.arguments(), 0.3, **named)


def test_no_tokens() -> None:
    batch = make_batch([0], [0], (2, 1), (16, 16), 16, torch.float32)
    assert ops.paged_attention(*batch.arguments(), 0.3).shape == (0, 2, 16)
    assert ops.attention(batch.query, batch.key, batch.value, 0.3).shape == (0, 2, 16)
