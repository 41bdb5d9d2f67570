"""How paged attention on a GPU is cut: tiles, splits and programs, from shapes and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass

from enginery.kernels.triton.gpu import Gpu
from enginery.kernels.triton.hopper import hopper_prompts

PROGRAMS = 4
"""Of *short* a multiprocessor that fill the GPU: equal contexts gain nothing by more splits than that."""
SHORT_PIECE = 16
"""Blocks that a program of *short* may have without holding up the others."""


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
    hopper_programs: int = 0
    """Programs of `attend_prompts`. It and `attend_few`, the kernels for Hopper, have what they take; 0: the general
    ones have all."""

    @property
    def launches(self) -> tuple[str, ...]:
        """As planned: the general kernels have what those for Hopper do not take."""
        short, long = ("attend_few", "attend_prompts") if self.hopper_programs else ("attend_short", "attend_long")
        return (short,) if self.decode else ("write_cache", short, long)

    def short_tokens(self, groups: int) -> int:
        """New tokens of a sequence that *short* takes at most."""
        return self.short.block_m // groups


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number` and at least 16, the least side of a matrix product."""
    return max(16, 1 << (number - 1).bit_length())


def runs_hopper_kernels(gpu: Gpu) -> bool:
    """There are the matrix units that they are written for, and the Triton that compiles them."""
    return gpu.is_hopper and hopper_prompts is not None


def plan_launch(
    gpu: Gpu,
    tokens: int,
    sequences: int,
    capacity: int,
    kv_heads: int,
    groups: int,
    width: int,
    itemsize: int,
    *,
    is_plain: bool = True,
    listed: bool = True,
    copied_ahead: bool = True,
) -> LaunchPlan:
    """`capacity`: keys that a block table can name; `width`: the larger padded head size; `itemsize`: bytes a number;
    `is_plain`: no feature changes scores or hides keys; `listed`: `attend_few` would take the call; `copied_ahead`:
    new keys and values are.

    The tiles are the fastest found on an H200 (`benchmarks/gpu_kernels.py --tune`). Decoding wants many small programs,
    one warp and one page at a time, whose loads hide each other's latency.
    """
    rows = power_of_two(groups)
    if itemsize > 2:
        short, long = Tiling(rows, 16, 4, 3), Tiling(rows, 16, 4, 2)
    elif width <= 128:
        short, long = Tiling(rows, 16, 1 if rows == 16 else 4, 5), Tiling(max(rows, 64), 64, 4, 3, gpu.overlaps)
    else:
        short, long = Tiling(rows, 16, 4, 5), Tiling(max(rows, 64), 32, 4, 2)
    if gpu.is_hopper and itemsize == 2 and not copied_ahead:
        # Descriptors of tiles that are not copied ahead are the same in every step of a loop. ptxas 12.8, which Triton
        # 3.6 brings, may compute them from registers that nothing has written (36 and 16 columns of keys and values on
        # an H200: reads beyond a program's shared memory).
        long = Tiling(max(rows, 32), 32, 4 if rows <= 32 else 2, 2)  # too few rows, or warps, for descriptors
    on_hopper = runs_hopper_kernels(gpu) and width == 128 and itemsize == 2 and is_plain
    splits, share = plan_splits(gpu, sequences * kv_heads, capacity // short.block_n, listed=on_hopper and listed)
    # Of prompts one program a multiprocessor: its shared memory holds no second one.
    return LaunchPlan(tokens == sequences, short, long, splits, share, gpu.overlaps, gpu.processors if on_hopper else 0)


def plan_splits(gpu: Gpu, pairs: int, blocks: int, *, listed: bool = False) -> tuple[int, int]:
    """(most splits, blocks that each has at least) for so many pairs of sequence and kv head of up to `blocks` each.

    `listed`: splits that a sequence does not have cost nothing (`hopper_splits.py`).

    Few pairs are cut until they fill the GPU, if that leaves no long pieces. Many fill it by themselves, but contexts
    differ: a long one, served by a single program, would hold up the step (248 sequences of 343 keys on average and
    2,138 at most, by `attend_short`: 153 µs in one piece each, 113 in pieces of at least 512 keys on an H200;
    `benchmarks/gpu_kernels.py`).
    """
    filling = PROGRAMS * gpu.processors // max(1, pairs)
    choices = ((4, 8, 8), (2, 16, 8), (1, 8, 16), (0, 8 if listed else 4, 32))
    wanted, share = next((most, least) for bound, most, least in choices if filling >= bound)
    if filling >= 8 or blocks <= filling * SHORT_PIECE:
        wanted, share = filling, 1
    # Powers of two: each number of splits is a kernel that has to be compiled.
    splits = max(1, min(wanted, blocks // max(4, share), 64))
    return 1 << (splits.bit_length() - 1), share
