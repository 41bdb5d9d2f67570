"""The GPU's paged attention against the op's reference in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from enginery.errors import UnsupportedError
from enginery.ops.paged_attention import paged_attention_reference
from enginery.ops.rotary_paged_attention import rotary_paged_attention_reference

from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import attention_plan
    from enginery.kernels.triton import paged_attention as kernels
    from enginery.kernels.triton.attention_plan import Tiling
    from enginery.kernels.triton.gpu import Gpu
    from enginery.kernels.triton.rotary import rotary_paged_attention

# Rows of padding divide by zero; NumPy, which interprets, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BLOCK = 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Sequences as (cached, new) token counts; the rest is the shape and the features of the call."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dk: int = 16
    dv: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    padding: int = 0
    empty: int = 0


def build(case: Case, seed: int) -> tuple[tuple[torch.Tensor, ...], dict]:
    """The call's tensors; pages are scattered and hold NaN where nothing was written."""
    torch.manual_seed(seed)
    cached, new = zip(*case.sequences, strict=True)
    width = max(-(-(c + n) // BLOCK) for c, n in case.sequences)
    pages = list(range(1, 1 + width * len(new)))
    random.Random(seed).shuffle(pages)
    tables = torch.tensor(pages, dtype=torch.int32).view(len(new), width)
    key_cache = torch.full((len(pages) + 1, case.kv_heads, BLOCK, case.dk), torch.nan, dtype=case.dtype)
    value_cache = torch.full((len(pages) + 1, case.kv_heads, BLOCK, case.dv), torch.nan, dtype=case.dtype)
    slots = []
    for table, past, fresh in zip(tables, cached, new, strict=True):
        positions = torch.arange(past + fresh)
        blocks, offsets = table[positions // BLOCK].long(), positions % BLOCK
        for cache, size in ((key_cache, case.dk), (value_cache, case.dv)):
            cache[blocks[:past], :, offsets[:past]] = torch.randn(past, case.kv_heads, size).to(case.dtype)
        slots.append((blocks * BLOCK + offsets)[past:])
    tokens = sum(new) + case.padding
    slot_mapping = torch.cat([*slots, torch.full((case.padding,), -1)])
    query_start = torch.tensor([0, *new, *[0] * case.empty]).cumsum(0).int()
    seq_lens = torch.tensor([c + n for c, n in case.sequences] + [0] * case.empty).int()
    tables = torch.cat([tables, tables.new_zeros(case.empty, width)])
    # A slice of a fused projection: the stride between tokens is larger than a token.
    # It is made where it is used, for a copy to a GPU is made contiguous.
    fused = torch.randn(tokens, case.heads * case.dk + case.kv_heads * (case.dk + case.dv)).to(DEVICE, case.dtype)
    parts = fused.split([case.heads * case.dk, case.kv_heads * case.dk, case.kv_heads * case.dv], dim=1)
    query, key, value = (part.unflatten(1, (-1, d)) for part, d in zip(parts, (case.dk, case.dk, case.dv), strict=True))
    tensors = (query, key, value, key_cache, value_cache, slot_mapping, tables, query_start, seq_lens)
    options = {"window": case.window, "softcap": case.softcap}
    options["sinks"] = torch.randn(case.heads).to(case.dtype).to(DEVICE) if case.sinks else None
    options["alibi_slopes"] = torch.rand(case.heads).to(DEVICE) if case.alibi else None
    return tuple(tensor.to(DEVICE) for tensor in tensors), options


def check(case: Case, plan: kernels.LaunchPlan | None = None, arrivals: torch.Tensor | None = None) -> None:
    tensors, options = build(case, seed=random.SystemRandom().randrange(1 << 30))
    scale = case.dk**-0.5
    wide = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in tensors]
    expected = paged_attention_reference(*wide, scale, **options)
    actual = kernels.paged_attention(*tensors, scale, **options, plan=plan, arrivals=arrivals)
    assert actual.dtype == case.dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=TOLERANCE[case.dtype] * float(expected.abs().max())
    )
    # The caches are copies: equal to the bit, and untouched where nothing belongs.
    for written, wanted in zip(tensors[3:5], wide[3:5], strict=True):
        torch.testing.assert_close(written.double(), wanted, rtol=0, atol=0, equal_nan=True)


def plan(splits: int, *, decode: bool, block_n: int = 16, share: int = 1) -> kernels.LaunchPlan:
    return kernels.LaunchPlan(
        decode, Tiling(16, block_n, 4, 2), Tiling(16, block_n, 4, 2), splits, share
    )  # fmt: skip


def check_turned(case: Case) -> None:
    """With rotary embedding: queries and new keys are turned on their way, or before."""
    (query, key, value, *batch), options = build(case, seed=random.SystemRandom().randrange(1 << 30))
    # Real angles: of random factors some make scores so large that their rounding shows.
    angles = (torch.rand(len(query), case.dk // 2) * 6.3).repeat(1, 2)
    cos, sin = (table.to(DEVICE, case.dtype) for table in (angles.cos(), angles.sin()))
    scale = case.dk**-0.5
    turned = (query, key, value, cos, sin, *batch)
    wide = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in turned]
    expected = rotary_paged_attention_reference(*wide, scale, *options.values())
    actual = rotary_paged_attention(*turned, scale, *options.values())
    atol = TOLERANCE[case.dtype] * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    for written, wanted in zip(batch[:2], wide[5:7], strict=True):
        atol = TOLERANCE[case.dtype] * float(wanted.nan_to_num().abs().max())
        torch.testing.assert_close(written.double(), wanted, rtol=0, atol=atol, equal_nan=True)


DECODE = Case(((37, 1), (0, 1), (64, 1), (15, 1)))
MIXED = Case(((37, 1), (0, 21), (16, 3), (5, 9)), padding=2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_splits_of_the_keys_change_nothing(case: Case, splits: int) -> None:
    check(case, plan(splits, decode=case is DECODE))


@pytest.mark.parametrize("features", [{}, {"window": 30}, {"softcap": 2.0, "alibi": True, "sinks": True}], ids=str)
def test_prompts_by_descriptors(features: dict) -> None:
    """New keys come by the tensor memory accelerator, beside cached ones and in the next sequence."""
    tiling = Tiling(16, 16, 4, 2, descriptors=True)
    case = Case(((35, 36), (3, 1), (0, 20)), heads=2, kv_heads=1, dtype=torch.float16, padding=3, **features)
    check(case, replace(plan(1, decode=False), long=tiling))


def test_descriptors_take_aligned_rows_of_two_bytes_in_sizes_of_powers_of_two() -> None:
    rows = torch.zeros(4, 3, 32, dtype=torch.bfloat16)
    described = kernels.describe(rows, 64)
    assert (tuple(described.shape), tuple(described.strides), described.block_shape) == ((4, 96), (96, 1), [64, 32])
    assert kernels.describe(rows.float(), 64) is None
    assert kernels.describe(rows[..., :24].contiguous(), 64) is None
    assert kernels.describe(torch.zeros(385, dtype=torch.bfloat16)[1:].view(4, 3, 32), 64) is None


@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_calls_share_their_counters(case: Case) -> None:
    """Whatever the batch, the counters are zero again after a call, for the next one."""
    arrivals = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    for splits, share in ((4, 1), (8, 3)):
        check(case, plan(splits, decode=case is DECODE, share=share), arrivals)
        assert not arrivals.any()


def test_too_few_counters_are_left_alone() -> None:
    arrivals = torch.full((7,), 5, dtype=torch.int32, device=DEVICE)
    check(DECODE, plan(2, decode=True), arrivals)
    assert arrivals.tolist() == [5] * 7


def test_there_are_counters_for_a_large_batch() -> None:
    assert len(kernels.new_arrivals(DEVICE)) >= 1024 * 32


@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "features",
    [
        {"window": 20},
        {"window": 1},
        {"softcap": 1.5},
        {"sinks": True},
        {"alibi": True},
        {"window": 18, "softcap": 2.0, "sinks": True, "alibi": True},
    ],
    ids=["window", "window-1", "softcap", "sinks", "alibi", "all"],
)
def test_features(case: Case, features: dict) -> None:
    check(replace(case, **features), plan(2, decode=case is DECODE, block_n=16 if case is DECODE else 32))


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 3, "kv_heads": 3},
        {"heads": 7, "kv_heads": 1},
        {"heads": 20, "kv_heads": 1},
        {"dk": 24, "dv": 16},
        {"dk": 40, "dv": 24},
    ],
    ids=["multi-head", "groups-of-7", "multi-query-20", "dk-above-dv", "odd-sizes"],
)
def test_shapes(shape: dict) -> None:
    check(replace(Case(((33, 1), (4, 12))), **shape))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 192, 256])
def test_head_sizes(size: int) -> None:
    check(Case(((18, 1), (3, 6)), heads=2, kv_heads=1, dk=size, dv=min(size, 128)))


@pytest.mark.parametrize(
    "sizes", [(20, 16), (24, 16), (32, 16), (36, 16), (60, 28), (68, 16), (16, 20), (96, 64), (192, 128)], ids=str
)
@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_keys_and_values_of_different_sizes(case: Case, sizes: tuple[int, int]) -> None:
    """Rows of some are no multiple of what is copied at once, which changes how a kernel is compiled."""
    check(replace(case, dk=sizes[0], dv=sizes[1], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


def test_padded_batches_give_zeros_and_leave_the_cache_alone() -> None:
    check(Case(((17, 1), (3, 1)), padding=2, empty=2))
    check(Case(((17, 1), (0, 18)), padding=5, empty=3))


def test_a_long_chunk_among_empty_sequences_is_still_right() -> None:
    check(Case(((10, 7), (3, 1)), empty=6))


def test_more_ragged_prompts_than_programs() -> None:
    """Two tiles for 9 tokens each, where the grid counts 9 / 8 and RAGGED."""
    prompts = tuple((3 * i, 9) for i in range(2 * kernels.RAGGED))
    check(Case(((9, 1), (0, 0), *prompts, (4, 2)), heads=2, kv_heads=1, empty=1))


def test_no_sequences_give_zeros() -> None:
    tensors, _ = build(DECODE, seed=3)
    none = [tensor[:n] for tensor, n in zip(tensors[6:], (0, 1, 0), strict=True)]
    assert not kernels.paged_attention(*tensors[:5], torch.full_like(tensors[5], -1), *none, 0.25).any()


def test_capacity_decides_the_splits() -> None:
    gpu = Gpu(processors=132, capability=(9, 0))
    llama = {"kv_heads": 8, "groups": 4, "width": 128, "itemsize": 2}
    alone = kernels.plan_launch(gpu, 1, 1, 8192, **llama)
    crowd = kernels.plan_launch(gpu, 256, 256, 8192, **llama)
    mixed = kernels.plan_launch(gpu, 900, 5, 8192, **llama)
    few, prompts, most = "attend_few", "attend_prompts", 8
    if kernels.hopper_decode is None:
        few, prompts, most = "attend_short", "attend_long", 4
    assert ((alone.splits, alone.share), (crowd.splits, crowd.share)) == ((64, 1), (most, 32))
    assert alone.launches == crowd.launches == (few,)
    assert mixed.launches == ("write_cache", few, prompts)
    assert kernels.plan_launch(gpu, 1, 1, 32, **llama).splits == 1


@pytest.mark.parametrize("groups", [1, 4, 32, 64])
def test_tiles_of_what_is_not_copied_ahead_need_no_descriptors(groups: int) -> None:
    """Four warps and 64 rows would have them, on Hopper."""
    for capability, is_small in (((9, 0), True), ((8, 0), False)):
        gpu = Gpu(132, capability)
        plan = kernels.plan_launch(gpu, 900, 5, 8192, 1, groups, 64, 2, copied_ahead=False)
        assert (plan.long.block_m < 64 or plan.long.num_warps < 4) == is_small
        assert plan.long.block_m % groups == 0
        wide = kernels.plan_launch(gpu, 900, 5, 8192, 1, groups, 64, 4)
        assert kernels.plan_launch(gpu, 900, 5, 8192, 1, groups, 64, 4, copied_ahead=False) == wide


def test_plans_for_the_general_kernels_cut_a_crowd_less() -> None:
    """On other GPUs, and where there are features."""
    llama = {"kv_heads": 8, "groups": 4, "width": 128, "itemsize": 2}
    ampere, hopper = Gpu(132, (8, 0)), Gpu(132, (9, 0))
    for gpu, is_plain in ((ampere, True), (ampere, False), (hopper, False)):
        crowd = kernels.plan_launch(gpu, 256, 256, 8192, **llama, is_plain=is_plain)
        mixed = kernels.plan_launch(gpu, 900, 5, 8192, **llama, is_plain=is_plain)
        assert (crowd.splits, crowd.share, crowd.launches) == (4, 32, ("attend_short",))
        assert mixed.launches == ("write_cache", "attend_short", "attend_long")


def test_a_cache_in_another_layout_is_refused() -> None:
    tensors, options = build(DECODE, seed=1)
    tensors = (*tensors[:3], tensors[3].transpose(1, 2).contiguous().transpose(1, 2), *tensors[4:])
    with pytest.raises(UnsupportedError, match="key_cache is not contiguous"):
        kernels.paged_attention(*tensors, 0.25, **options)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_batch() -> None:
    """The same graph serves other lengths, pages and paddings: nothing of the batch was read at capture."""
    first, options = build(Case(((300, 1), (5, 1), (40, 1), (0, 1)), dk=64, dv=64, dtype=torch.float16), seed=1)
    buffers = [tensor.clone() for tensor in first]
    kernels.paged_attention(*buffers, 0.125, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernels.paged_attention(*buffers, 0.125, **options)
    other = Case(((290, 1), (17, 1)), dk=64, dv=64, dtype=torch.float16, padding=2, empty=2)
    second, _ = build(other, seed=2)
    wide = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in second]
    for buffer, tensor in zip(buffers, second, strict=True):
        buffer[tuple(slice(n) for n in tensor.shape)] = tensor
    graph.replay()
    expected = paged_attention_reference(*wide, 0.125)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("general", [False, True], ids=["as-chosen", "general"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "features", [{}, {"window": 700, "softcap": 20.0, "sinks": True, "alibi": True}], ids=["plain", "all"]
)
def test_full_size_batches(features: dict, dtype: torch.dtype, general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of real models: long contexts split, large tiles of queries, decoding and prefill in one batch.

    `general`: as on a GPU that has no kernels of its own.
    """
    if general:
        monkeypatch.setattr(attention_plan, "hopper_prompts", None)
    draw = random.Random(int(torch.randint(1 << 30, ())))
    decode = tuple((draw.randrange(3000), 1) for _ in range(12))
    case = Case(decode, heads=32, kv_heads=8, dk=128, dv=128, dtype=dtype, **features)
    check(case)
    check(replace(case, sequences=(*decode[:5], (0, 300), (1000, 130), (77, 3), (2000, 33)), padding=7, empty=2))
    check(replace(case, sequences=((5000, 1),)))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_overlapped_launches_change_nothing(overlap: bool) -> None:
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    case = Case(((3000, 1), (0, 1), (777, 1)), heads=32, kv_heads=8, dk=128, dv=128, dtype=torch.bfloat16)
    base = kernels.plan_launch(Gpu(132, (9, 0) if overlap else (8, 0)), 3, 3, 3008, 8, 4, 128, 2)
    assert base.splits > 1
    plans = [replace(base, hopper_programs=0)]
    if base.hopper_programs and attention_plan.runs_hopper_kernels(Gpu.of(DEVICE)):
        plans.append(base)
    for plan in plans * 5:
        check(case, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 20, 64])
@pytest.mark.parametrize(
    "case", [DECODE, MIXED, Case(((37, 3), (0, 1), (9, 0), (0, 0)))], ids=["decode", "mixed", "idle"]
)
def test_rotary_embedding_on_the_way(case: Case, size: int, dtype: torch.dtype) -> None:
    check_turned(replace(case, dk=size, dtype=dtype))
