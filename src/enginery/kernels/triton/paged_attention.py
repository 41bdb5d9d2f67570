"""Paged attention on NVIDIA GPUs: `enginery::paged_attention` for the CUDA dispatch key.

Two kernels share the batch by the number of a sequence's new tokens, which only the device knows:

- *short* (at most BLOCK_Q new tokens: decoding, speculation): split-K (Dao et al., "Flash-Decoding", 2023). The keys of
  a sequence are cut into parts (`plan_splits`), so that few sequences fill the GPU and a long one among many does not
  hold it up; the program that ends last merges the parts.
- *long* (prefill chunks): one program per tile of queries and kv head; blocks of keys that the causal mask or the
  window hides are skipped. New keys are read where the projections left them, cached ones through the table.

What most models need of either on Hopper, `hopper_decode.py` and `hopper_prompts.py` do faster: 16 bits (of prompts
bfloat16), heads of 128, no feature. The former reads a context once for each new token, of which there is mostly one.

Where there are as many tokens as sequences (T = S: decoding), only *short* runs, and it writes the cache too: the new
tokens go through registers on their way there, turned if there is rotary embedding. Otherwise `write_cache` comes
first, and turns all queries and new keys once; tiles of prompts read them again and again. Every grid follows from
shapes, nothing is read on the host, so a call can be captured in a CUDA graph. Either plan is right for any batch;
T = S with long chunks among empty sequences is merely slow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from enginery.errors import UnsupportedError
from enginery.kernels.triton.attention_kernels import attend_long, attend_short, write_cache
from enginery.kernels.triton.attention_plan import LaunchPlan, plan_launch, power_of_two
from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.hopper import hopper_decode, hopper_prompts

ARRIVALS = 1 << 16
"""Counters that all calls share: 256 KiB for 2,048 sequences of 32 kv heads."""

RAGGED = 8
"""Tiles of queries that are not full for which *long* has programs: each prompt of a step ends in one."""


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


@dataclass(frozen=True)
class Call:
    """The arguments of `paged_attention`, the rows of heads contiguous, and what kernels are told of them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    angles: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value, self.key_cache, self.value_cache

    @property
    def tokens(self) -> int:
        return len(self.query)

    @property
    def sequences(self) -> int:
        return len(self.block_tables)

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key_cache.shape[1]

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def sizes(self) -> dict[str, int]:
        dk, block_size, dv = self.query.shape[2], *self.value_cache.shape[2:]
        padded = {"PADDED_DK": power_of_two(dk), "PADDED_DV": power_of_two(dv)}
        return {"DK": dk, "DV": dv, "BLOCK_SIZE": block_size, **padded}

    @property
    def is_plain(self) -> bool:
        """No feature changes scores or hides keys, beyond causality."""
        return self.window is None and self.softcap is None and self.sinks is None and self.alibi_slopes is None

    @property
    def copied_ahead(self) -> bool:
        """New keys and values are, by *long*: Triton must know that rows are multiples of 16 numbers apart, and begin
        at multiples of 16 bytes. Turned keys lie in a tensor of their own."""
        key_stride = self.key.stride(0) if self.angles is None else self.kv_heads * self.key.shape[2]
        numbers = (key_stride, self.value.stride(0), self.key.data_ptr(), self.value.data_ptr())
        return not any(number % 16 for number in numbers)

    @cached_property
    def suits_attend_few(self) -> bool:
        """Asked for the plan, and where it is followed."""
        return self.is_plain and hopper_decode is not None and hopper_decode.takes(*self.operands)

    @property
    def features(self) -> dict[str, Any]:
        return {
            "GROUPS": self.groups,
            "KV_HEADS": self.kv_heads,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "HAS_WINDOW": self.window is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_SINKS": self.sinks is not None,
            "HAS_ALIBI": self.alibi_slopes is not None,
        }

    @property
    def numbers(self) -> tuple[float, int, float]:
        return self.scale, 0 if self.window is None else self.window, 1.0 if self.softcap is None else self.softcap

    # A kernel needs a pointer where a feature is off, too; it is never followed.

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        sinks = self.query if self.sinks is None else self.sinks
        return sinks, self.query if self.alibi_slopes is None else self.alibi_slopes

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin"""
        return (self.query, self.query) if self.angles is None else self.angles

    @property
    def cache_strides(self) -> tuple[int, int]:
        return self.key_cache.stride(0), self.value_cache.stride(0)

    @property
    def strides(self) -> tuple[int, ...]:
        return (
            self.query.stride(0), self.key.stride(0), self.value.stride(0), self.block_tables.stride(0),
            *self.cache_strides,
        )  # fmt: skip

    def plan(self) -> LaunchPlan:
        block_size, width = self.value_cache.shape[2], max(self.sizes["PADDED_DK"], self.sizes["PADDED_DV"])
        return plan_launch(
            Gpu.of(self.query.device), self.tokens, self.sequences, self.block_tables.shape[1] * block_size,
            self.kv_heads, self.groups, width, self.query.element_size(), is_plain=self.is_plain,
            listed=self.suits_attend_few, copied_ahead=self.copied_ahead,
        )  # fmt: skip


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
    _check_layout("key_cache", key_cache)
    _check_layout("value_cache", value_cache)
    call = Call(
        rows_of(query), rows_of(key), rows_of(value), key_cache, value_cache, slot_mapping, block_tables, query_start,
        seq_lens, scale, window, softcap, sinks, alibi_slopes, angles,
    )  # fmt: skip
    if plan is None:
        plan = call.plan()
    output = query.new_empty(call.tokens, call.heads, value_cache.shape[3])
    if call.tokens == 0 or call.sequences == 0:
        return output.zero_()
    if not plan.decode:
        call = _write_cache(call, output)
    _attend_short(call, plan, output, arrivals)
    if not plan.decode:
        _attend_long(call, plan, output)
    return output


def _write_cache(call: Call, output: torch.Tensor) -> Call:
    """Also zeroes the output of tokens that belong to nobody; returns the call with queries and keys turned."""
    turned = call
    if call.angles is not None:
        query, key = (heads.new_empty(heads.shape) for heads in (call.query, call.key))
        turned = replace(call, query=query, key=key, angles=None)
    cos, sin = call.tables
    write_cache[(call.tokens,)](
        call.query, call.key, call.value, cos, sin, turned.query, turned.key, call.key_cache, call.value_cache,
        call.slot_mapping, call.query_start, output, call.sequences, call.query.stride(0), call.key.stride(0),
        call.value.stride(0), cos.stride(0), *call.cache_strides,
        KV_HEADS=call.kv_heads, HEADS=call.heads, PADDED_KV_HEADS=triton.next_power_of_2(call.kv_heads),
        PADDED_HEADS=triton.next_power_of_2(call.heads), PADDED_OUTPUT=triton.next_power_of_2(output[0].numel()),
        ROTARY=call.angles is not None, **call.sizes,
    )  # fmt: skip
    return turned


def _attend_short(call: Call, plan: LaunchPlan, output: torch.Tensor, arrivals: torch.Tensor | None) -> None:
    _, heads, dv = output.shape
    pairs = call.sequences * call.kv_heads
    rows = call.tokens if plan.decode else call.sequences * plan.short_tokens(call.groups)
    partial_sums = partial_stats = output
    if arrivals is None or len(arrivals) < pairs:
        arrivals = output if plan.splits == 1 else output.new_zeros(pairs, dtype=torch.int32)
    if plan.splits > 1:
        partial_sums = output.new_empty(plan.splits, rows, heads, dv, dtype=torch.float32)
        partial_stats = output.new_empty(2, plan.splits, rows, heads, dtype=torch.float32)
    if plan.hopper_programs and call.suits_attend_few:
        hopper_decode.launch(
            *call.operands, call.slot_mapping, call.block_tables, call.query_start, call.seq_lens, call.scale,
            call.angles, output, (partial_sums, partial_stats, arrivals), rows, plan.splits, plan.share,
            plan.short_tokens(call.groups), decode=plan.decode,
        )  # fmt: skip
        return
    padded_groups = triton.next_power_of_2(call.groups)
    attend_short[(call.kv_heads, call.sequences, plan.splits)](
        call.query, call.key, call.value, call.key_cache, call.value_cache, call.slot_mapping, call.block_tables,
        call.query_start, call.seq_lens, *call.biases, *call.tables, output, partial_sums, partial_stats, arrivals,
        call.sequences, rows, *call.strides, call.tables[0].stride(0), *call.numbers,
        BLOCK_M=plan.short.block_m, BLOCK_N=plan.short.block_n, SPLITS=plan.splits,
        SHARE=plan.share, PARTS=parts_at_once(plan, padded_groups * power_of_two(dv)),
        PADDED_GROUPS=padded_groups, DECODE=plan.decode, ROTARY=call.angles is not None,
        OVERLAP=plan.overlap, launch_pdl=plan.overlap,
        **plan.short.options, **call.sizes, **call.features,
    )  # fmt: skip


def _attend_long(call: Call, plan: LaunchPlan, output: torch.Tensor) -> None:
    """Queries and keys are turned already."""
    if plan.hopper_programs and call.is_plain and hopper_prompts.takes(*call.operands):
        hopper_prompts.launch(
            *call.operands, call.block_tables, call.query_start, call.seq_lens, call.scale, output,
            plan.short_tokens(call.groups), plan.hopper_programs,
        )  # fmt: skip
        return
    key_tiles = value_tiles = None
    if plan.long.descriptors:
        key_tiles, value_tiles = (describe(tensor, plan.long.block_n) for tensor in (call.key, call.value))
    tiles = call.tokens // (plan.long.block_m // call.groups) + min(call.sequences, RAGGED)
    attend_long[(call.kv_heads, tiles)](
        call.query, call.key, call.value, key_tiles, value_tiles, call.key_cache, call.value_cache, call.block_tables,
        call.query_start, call.seq_lens, *call.biases, output, call.sequences, *call.strides, *call.numbers,
        BLOCK_M=plan.long.block_m, BLOCK_N=plan.long.block_n,
        PADDED_SEQUENCES=triton.next_power_of_2(call.sequences), SHORT=plan.short_tokens(call.groups),
        **plan.long.options, **call.sizes, **call.features,
    )  # fmt: skip
