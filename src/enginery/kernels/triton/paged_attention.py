"""Paged attention on NVIDIA GPUs: `enginery::paged_attention` for the CUDA dispatch key.

Two kernels share the batch by the number of a sequence's new tokens, which only the device knows:

- *short* (at most BLOCK_Q new tokens: decoding, speculation): split-K (Dao et al., "Flash-Decoding", 2023). The keys of
  a sequence are cut into parts (`plan_splits`), so that few sequences fill the GPU and a long one among many does not
  hold it up; the program that ends last merges the parts.
- *long* (prefill chunks): one program per tile of queries and kv head; blocks of keys that the causal mask or the
  window hides are skipped. New keys are read where the projections left them, cached ones through the table.

Where there are as many tokens as sequences (T = S: decoding), only *short* runs, and it writes the cache too: the new
tokens go through registers on their way there. Otherwise `write_cache` comes first. With rotary embedding a kernel
turns what it reads; only *long* gets the new keys turned, for it reads them again and again. Every grid follows from
shapes, nothing is read on the host, so a call can be captured in a CUDA graph. Either plan is right for any batch;
T = S with long chunks among empty sequences is merely slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from enginery.errors import UnsupportedError
from enginery.kernels.triton.attention_kernels import attend_long, attend_short, write_cache

ARRIVALS = 1 << 16
"""Counters that all calls share: 256 KiB for 2,048 sequences of 32 kv heads."""

RAGGED = 8
"""Tiles of queries that are not full for which *long* has programs: each prompt of a step ends in one."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work: rows and keys of a tile, warps of a program, stages of its pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """*long*: new keys and values come by tensor descriptors (the tensor memory accelerator, from 9.0), if they can."""

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LaunchPlan:
    """Everything of a call that is fixed before the GPU sees it; a function of shapes and dtypes alone."""

    decode: bool
    """As many tokens as sequences: one launch, which writes the cache, too."""
    short: Tiling
    long: Tiling
    splits: int
    """The most that a sequence's keys are cut into by *short*."""
    share: int = 1
    """Blocks of keys that each split gets at least: with fewer, there are fewer splits."""
    overlap: bool = False
    """Launch *short* while its predecessor still runs (programmatic dependent launch, from compute capability 9.0)."""

    @property
    def launches(self) -> tuple[str, ...]:
        return ("attend_short",) if self.decode else ("write_cache", "attend_short", "attend_long")


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number` and at least 16, the least side of a matrix product."""
    return max(16, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on."""

    processors: int
    """multiprocessors"""
    hopper_or_later: bool
    """Compute capability 9.0 or more: launches can overlap, and tiles come by tensor descriptors."""

    @property
    def programs(self) -> int:
        """Of *short* that fill the GPU, four a multiprocessor: equal contexts gain nothing by more splits than that."""
        return 4 * self.processors

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        if device.type != "cuda":
            return cls(1, False)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, properties.major >= 9)


def plan_launch(
    gpu: Gpu, tokens: int, sequences: int, capacity: int, kv_heads: int, groups: int, width: int, itemsize: int
) -> LaunchPlan:
    """`capacity`: keys that a block table can name; `width`: the larger padded head size; `itemsize`: bytes a number.

    The tiles are the fastest found on an H200 (`benchmarks/gpu_kernels.py --tune`). Decoding wants many small programs,
    one warp and one page at a time, whose loads hide each other's latency.
    """
    rows = power_of_two(groups)
    if itemsize > 2:
        short, long = Tiling(rows, 16, 4, 3), Tiling(rows, 16, 4, 2)
    elif width <= 128:
        short, long = Tiling(rows, 16, 1 if rows == 16 else 4, 5), Tiling(max(rows, 64), 64, 4, 3, gpu.hopper_or_later)
    else:
        short, long = Tiling(rows, 16, 4, 5), Tiling(max(rows, 64), 32, 4, 2)
    splits, share = plan_splits(gpu, sequences * kv_heads, capacity // short.block_n)
    return LaunchPlan(tokens == sequences, short, long, splits, share, overlap=gpu.hopper_or_later)


def plan_splits(gpu: Gpu, pairs: int, blocks: int) -> tuple[int, int]:
    """(most splits, blocks that each has at least) for so many pairs of sequence and kv head of up to `blocks` each.

    Few pairs are cut until they fill the GPU. Many fill it by themselves, but contexts differ: a long one, served by a
    single program, would hold up the step (248 sequences of 343 keys on average and 2,138 at most: 153 µs in one piece
    each, 113 in pieces of at least 512 keys on an H200; `benchmarks/gpu_kernels.py`).
    """
    filling = gpu.programs // max(1, pairs)
    choices = ((8, filling, 1), (4, 8, 8), (2, 16, 8), (1, 8, 16), (0, 4, 32))
    wanted, share = next((most, least) for bound, most, least in choices if filling >= bound)
    # Powers of two: each number of splits is a kernel that has to be compiled.
    splits = max(1, min(wanted, blocks // max(4, share), 64))
    return 1 << (splits.bit_length() - 1), share


def new_arrivals(device: torch.device) -> torch.Tensor:
    """Counters for calls that split: one for each pair of sequence and kv head. Zero between calls.

    Calls that share them must be in one stream's order; graphs may hold them.
    """
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


def parts_at_once(plan: LaunchPlan, size: int) -> int:
    """Splits that a program of *short* merges at a time: `size` numbers each, 128 of them in a thread's registers."""
    most = 128 * 32 * plan.short.num_warps // size
    return max(1, min(most, triton.next_power_of_2(plan.splits)))


def _check_layout(name: str, tensor: torch.Tensor) -> None:
    if not tensor[0].is_contiguous():
        raise UnsupportedError(
            f"{name} is not contiguous within a block", "Allocate it as [blocks, Hkv, block_size, D]"
        )


def describe(tensor: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """Blocks of rows of one head of `[T, H, D]`, as the tensor memory accelerator takes them; None: it does not."""
    rows, size = tensor.flatten(1), tensor.shape[2]
    in_bytes = (tensor.data_ptr(), rows.stride(0) * tensor.element_size())
    if tensor.element_size() != 2 or size != power_of_two(size) or any(number % 16 for number in in_bytes):
        return None
    return TensorDescriptor.from_tensor(rows, [block_n, size])


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`[T, H, D]` with contiguous rows; a slice of a fused projection keeps its own stride between tokens."""
    return tensor if tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2] else tensor.contiguous()


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    plan: LaunchPlan | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contract of `enginery::paged_attention`, in 16 and 32 bits.

    `plan` overrides the choice. `angles`: tables cos and sin `[T, Dk]` by which queries and new keys are turned on
    their way. `arrivals`: of `new_arrivals`; without, or with too few, a call has its own.
    """
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    _check_layout("key_cache", key_cache)
    _check_layout("value_cache", value_cache)
    tokens, heads, dk = query.shape
    _, kv_heads, block_size, dv = value_cache.shape
    sequences, table_width = block_tables.shape
    groups = heads // kv_heads
    padded_dk, padded_dv, padded_groups = power_of_two(dk), power_of_two(dv), triton.next_power_of_2(groups)
    if plan is None:
        width, capacity = max(padded_dk, padded_dv), table_width * block_size
        gpu = Gpu.of(query.device)
        plan = plan_launch(gpu, tokens, sequences, capacity, kv_heads, groups, width, query.element_size())
    output = query.new_empty(tokens, heads, dv)
    if tokens == 0 or sequences == 0:
        return output.zero_()

    sizes = {"DK": dk, "DV": dv, "BLOCK_SIZE": block_size, "PADDED_DK": padded_dk, "PADDED_DV": padded_dv}
    features = {
        "GROUPS": groups,
        "KV_HEADS": kv_heads,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_ALIBI": alibi_slopes is not None,
        "ROTARY": angles is not None,
    }
    numbers = (scale, 0 if window is None else window, 1.0 if softcap is None else softcap)
    cache_strides = (key_cache.stride(0), value_cache.stride(0))
    # A kernel needs a pointer where a feature is off, too; it is never followed.
    sinks = query if sinks is None else sinks
    alibi_slopes = query if alibi_slopes is None else alibi_slopes
    cos, sin = (query, query) if angles is None else angles
    turned_key = key if angles is None or plan.decode else key.new_empty(key.shape)
    strides = (value.stride(0), block_tables.stride(0), *cache_strides, cos.stride(0))

    if not plan.decode:
        write_cache[(tokens,)](
            key, value, cos, sin, turned_key, key_cache, value_cache, slot_mapping, query_start, output, sequences,
            key.stride(0), value.stride(0), cos.stride(0), *cache_strides,
            KV_HEADS=kv_heads, HEADS=heads, PADDED_HEADS=triton.next_power_of_2(kv_heads),
            PADDED_OUTPUT=triton.next_power_of_2(heads * dv), ROTARY=angles is not None, **sizes,
        )  # fmt: skip
    short_tokens = plan.short.block_m // groups
    rows = tokens if plan.decode else sequences * short_tokens
    partial_sums = partial_stats = output
    if arrivals is None or len(arrivals) < sequences * kv_heads:
        arrivals = output if plan.splits == 1 else query.new_zeros(sequences * kv_heads, dtype=torch.int32)
    if plan.splits > 1:
        partial_sums = query.new_empty(plan.splits, rows, heads, dv, dtype=torch.float32)
        partial_stats = query.new_empty(2, plan.splits, rows, heads, dtype=torch.float32)
    attend_short[(kv_heads, sequences, plan.splits)](
        query, key, value, key_cache, value_cache, slot_mapping, block_tables, query_start, seq_lens, sinks,
        alibi_slopes, cos, sin, output, partial_sums, partial_stats, arrivals, sequences, rows,
        query.stride(0), key.stride(0), *strides, *numbers,
        BLOCK_M=plan.short.block_m, BLOCK_N=plan.short.block_n, SPLITS=plan.splits,
        SHARE=plan.share, PARTS=parts_at_once(plan, padded_groups * padded_dv),
        PADDED_GROUPS=padded_groups, DECODE=plan.decode, OVERLAP=plan.overlap, launch_pdl=plan.overlap,
        **plan.short.options, **sizes, **features,
    )  # fmt: skip
    if not plan.decode:
        long_tokens = plan.long.block_m // groups
        key_tiles = value_tiles = None
        if plan.long.descriptors:
            key_tiles, value_tiles = (describe(tensor, plan.long.block_n) for tensor in (turned_key, value))
        attend_long[(kv_heads, tokens // long_tokens + min(sequences, RAGGED))](
            query, turned_key, value, key_tiles, value_tiles, key_cache, value_cache, block_tables, query_start,
            seq_lens, sinks, alibi_slopes, cos, sin, output, sequences,
            query.stride(0), turned_key.stride(0), *strides, *numbers,
            BLOCK_M=plan.long.block_m, BLOCK_N=plan.long.block_n,
            PADDED_SEQUENCES=triton.next_power_of_2(sequences), SHORT=short_tokens,
            **plan.long.options, **sizes, **features,
        )  # fmt: skip
    return output
