"""The kernel of few new tokens for Hopper: when it is chosen, and on such a GPU its results against the reference in
float64.

Gluon has no interpreter: without a GPU its arithmetic is only compiled (`test_triton_compiles.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from enginery.ops.paged_attention import paged_attention_reference
from enginery.ops.rotary_paged_attention import rotary_paged_attention_reference

from .test_hopper_prompts import (
    FEATURES_AND_SIZES,
    H200,
    LLAMA,
    SCALE,
    SMALL,
    compare,
    draw,
    draw_angles,
    kernels_of,
    tensors_of,
    widened,
)
from .test_triton_paged_attention import Case
from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import attention_plan, hopper_decode
    from enginery.kernels.triton import paged_attention as kernels
    from enginery.kernels.triton.attention_plan import plan_splits
    from enginery.kernels.triton.gpu import Gpu
    from enginery.kernels.triton.rotary import rotary_paged_attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STEP = replace(SMALL, sequences=((5, 1), (16, 1)))
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TURNED = pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])


# When it is chosen


@HALVES
def test_decoding_goes_to_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(replace(STEP, dtype=dtype), monkeypatch) == ["attend_few"]
    assert kernels_of(replace(STEP, dtype=dtype, heads=32, kv_heads=2), monkeypatch) == ["attend_few"]


@HALVES
def test_beside_prompts_so_do_few_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of prompts has bfloat16 alone."""
    prompts = "attend_prompts" if dtype == torch.bfloat16 else "attend_long"
    assert kernels_of(replace(SMALL, dtype=dtype), monkeypatch) == ["write_cache", "attend_few", prompts]


@pytest.mark.parametrize(
    "change",
    [*FEATURES_AND_SIZES, {"dtype": torch.float32}, {"heads": 17}, {"heads": 40, "kv_heads": 2}],
    ids=str,
)
def test_features_and_other_shapes_go_to_the_general_kernel(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(replace(STEP, **change), monkeypatch) == ["attend_short"]
    assert kernels_of(replace(SMALL, **change), monkeypatch)[:2] == ["write_cache", "attend_short"]


@pytest.mark.parametrize("page", [8, 32])
def test_pages_of_another_size_go_to_the_general_kernel(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(STEP, monkeypatch, page=page) == ["attend_short"]
    assert kernels_of(SMALL, monkeypatch, page=page) == ["write_cache", "attend_short", "attend_long"]


def test_plans_for_other_gpus_keep_to_the_general_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(STEP, monkeypatch, hopper_programs=0) == ["attend_short"]
    assert kernels_of(SMALL, monkeypatch, hopper_programs=0) == ["write_cache", "attend_short", "attend_long"]


def test_it_takes_rows_of_16_bytes_a_thread() -> None:
    assert hopper_decode.takes(*tensors_of())
    assert hopper_decode.takes(*tensors_of(offset=8, stride=520, gap=64))
    for change in ({"offset": 4}, {"stride": 516}, {"page": 32}, {"gap": 4}, {"gap": 8}):
        assert not hopper_decode.takes(*tensors_of(**change)), change


def test_it_takes_one_dtype_of_16_bits() -> None:
    tensors = tensors_of()
    assert hopper_decode.takes(*(tensor.half() for tensor in tensors))
    assert not hopper_decode.takes(*(tensor.float() for tensor in tensors))
    for place, tensor in enumerate(tensors):
        assert not hopper_decode.takes(*tensors[:place], tensor.half(), *tensors[place + 1 :]), place


def test_launches_are_named_as_planned() -> None:
    step = kernels.plan_launch(H200, 64, 64, 8192, 8, 4, 128, 2)
    mixed = kernels.plan_launch(H200, 900, 64, 8192, 8, 4, 128, 2)
    assert step.launches == ("attend_few",)
    assert mixed.launches == ("write_cache", "attend_few", "attend_prompts")
    assert replace(step, hopper_programs=0).launches == ("attend_short",)
    assert replace(mixed, hopper_programs=0).launches == ("write_cache", "attend_short", "attend_long")


def test_listed_splits_of_a_crowd_are_more() -> None:
    """Those that a sequence does not have cost nothing. Few sequences have as many as the others' plans give them."""
    assert plan_splits(H200, 2048, 512, listed=True) == (8, 32)
    assert plan_splits(H200, 2048, 512) == (4, 32)
    assert plan_splits(H200, 2048, 128, listed=True) == (4, 32)
    for pairs in (8, 64, 128, 256, 512):
        assert plan_splits(H200, pairs, 512, listed=True) == plan_splits(H200, pairs, 512)
    plan = partial(kernels.plan_launch, H200, 256, 256, 8192, 8, 4)
    others = [plan(128, 4), plan(64, 2), plan(128, 2, is_plain=False), plan(128, 2, listed=False)]
    assert (plan(128, 2).splits, plan(128, 2).share) == (8, 32)
    assert {(other.splits, other.share) for other in others} == {(4, 32)}


@pytest.mark.parametrize(
    ("sequences", "splits", "grid", "listed"),
    [
        (1, 64, (2, 1, 64), 0),
        (32, 8, (2, 32, 8), 0),
        (33, 8, (2, 33 + 64, 1), 256),
        (64, 2, (2, 64 + 64, 1), 256),
        (257, 8, (2, 257 + 64, 1), 512),
        (65, 1, (2, 65, 1), 0),
    ],
)
def test_splits_have_places_in_the_grid_of_few_sequences(
    sequences: int, splits: int, grid: tuple[int, ...], listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **named: launched.append((grid, named["LISTED"], named["SPLITS"]))

    monkeypatch.setattr(hopper_decode, "attend_few", Kernel())
    tensors = draw(replace(STEP, heads=4, kv_heads=2, sequences=((5, 1),) * sequences))
    run(tensors, splits=splits, hopper_programs=132)
    assert launched == [(grid, listed, splits)]


# What it computes


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each launch of the kernel."""
    if not attention_plan.runs_hopper_kernels(Gpu.of(DEVICE)):
        pytest.skip("needs compute capability 9.0 and Triton 3.6")
    launch, tokens = hopper_decode.launch, []

    def note_and_launch(query: torch.Tensor, *rest: Any, **named: Any) -> None:
        tokens.append(len(query))
        launch(query, *rest, **named)

    monkeypatch.setattr(hopper_decode, "launch", note_and_launch)
    return tokens


Tensors = Sequence[torch.Tensor]


def run(tensors: Tensors, angles: Any = None, arrivals: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
    """By the plan that is chosen, but for the `changes`."""
    plan = replace(kernels.Call(*tensors, SCALE, *[None] * 5).plan(), **changes)
    return kernels.paged_attention(*tensors, SCALE, plan=plan, angles=angles, arrivals=arrivals)


def refer(tensors: Tensors, angles: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The reference's output and caches, in float64."""
    heads, rest = widened(tensors[:3]), widened(tensors[3:])
    if angles is None:
        return paged_attention_reference(*heads, *rest, SCALE), rest[:2]
    return rotary_paged_attention_reference(*heads, *widened(angles), *rest, SCALE), rest[:2]


def compare_caches(actual: Tensors, expected: Tensors, *, rotary: bool) -> None:
    """Equal to the bit, and untouched where nothing belongs; keys that were turned are rounded."""
    rounding = torch.finfo(actual[0].dtype).eps if rotary else 0.0
    for cache, wanted, rtol in zip(actual, expected, (rounding, 0.0), strict=True):
        torch.testing.assert_close(cache.double(), wanted, rtol=rtol, atol=1e-5 if rtol else 0.0, equal_nan=True)


def check(case: Case, *, rotary: bool = False, repeats: int = 0, **changes: Any) -> None:
    """`changes`: of the plan."""
    tensors = draw(case)
    angles = [table.to(case.dtype) for table in draw_angles(len(tensors[0]))] if rotary else None
    expected, caches = refer(tensors, angles)
    arrivals = kernels.new_arrivals(DEVICE)
    actual = run(tensors, angles, arrivals, **changes)
    compare(actual, expected, case)
    compare_caches(tensors[3:5], caches, rotary=rotary)
    for _ in range(repeats):
        assert torch.equal(run(tensors, angles, arrivals, **changes), actual)
    assert not arrivals.any()


def decoding(contexts: Sequence[int], case: Case = LLAMA) -> Case:
    return replace(case, sequences=tuple((context, 1) for context in contexts))


def evened(case: Case) -> Case:
    """With so many empty sequences that there are as many as tokens: what a step of decoding looks like."""
    return replace(case, empty=sum(new for _, new in case.sequences) + case.padding - len(case.sequences))


def draw_contexts(sequences: int, most: int = 3000) -> list[int]:
    """Log-normal, as a server has them, but for some that are long."""
    few = random.SystemRandom()
    contexts = [min(most, int(few.lognormvariate(5.2, 0.9))) for _ in range(sequences - 4)]
    contexts += [most, few.randrange(most), 0, most - 1]
    few.shuffle(contexts)
    return contexts


FEW_HEADS = replace(LLAMA, heads=8, kv_heads=2)
CONTEXTS = (0, 1, 15, 16, 17, 31, 32, 33, 48, 100, 333, 2138)
UNEVEN = (65, 130, 530, 1050, 1500)
"""Of 5, 9, 34, 66 and 94 pages: two for each split, and nothing is left for the last of 4, 8, 32 or 64."""
PLANS = (
    {},
    {"splits": 1},
    {"splits": 4, "share": 1},
    {"splits": 8, "share": 1},
    {"splits": 32, "share": 1},
    {"splits": 64, "share": 1},
    {"splits": 8, "share": 16},
)
CUT = pytest.mark.parametrize("plan", PLANS, ids=str)
SEVERAL = ((300, 7), (4, 0), (50, 1), (2000, 3), (0, 5), (16, 2), (15, 2), *((context, 3) for context in UNEVEN))
"""Of some tokens each, too, as if they were decoded one after another."""
MIXED = (
    (100, 256), (0, 1), (5, 3), (0, 4), (0, 0), (777, 33), (15, 2), (16, 1), (13, 4), (2000, 2), (2001, 4), (0, 70),
    *((context, 1 + context % 3) for context in UNEVEN), (300, 16), (300, 15), (200, 8), (1, 7),
)  # fmt: skip


@pytest.mark.gpu
@HALVES
@TURNED
def test_one_token_behind_any_context(rotary: bool, dtype: torch.dtype, launches: list[int]) -> None:
    check(replace(decoding(CONTEXTS), dtype=dtype), rotary=rotary)
    assert launches == [12]


@pytest.mark.gpu
@CUT
def test_wherever_the_keys_are_cut(plan: dict[str, int], launches: list[int]) -> None:
    check(decoding((*UNEVEN, *CONTEXTS)), rotary=True, **plan)
    assert launches == [17]


@pytest.mark.gpu
@pytest.mark.parametrize("context", [0, 5, 192, 8256])
def test_one_sequence(context: int, launches: list[int]) -> None:
    cuts = [(1, 1), *((splits, share) for splits in (2, 8, 64) for share in (1, 8, 32))]
    for splits, share in cuts:
        check(decoding([context]), rotary=True, splits=splits, share=share)
    check(decoding([context]))
    assert launches == [1] * 11


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (8, 8), (4, 2), (6, 2), (32, 8), (7, 1), (28, 4), (8, 1), (16, 1), (32, 2)]
)
def test_groups_of_heads(heads: int, kv_heads: int, launches: list[int]) -> None:
    """Also of numbers that do not fill a matrix product: 3, 7; a group decides how many tokens are few."""
    case = replace(LLAMA, heads=heads, kv_heads=kv_heads)
    check(decoding(CONTEXTS, case), rotary=True)
    check(replace(case, sequences=MIXED), rotary=True, splits=8, share=1)
    assert len(launches) == 2


@pytest.mark.gpu
@HALVES
@TURNED
def test_padded_batches_give_zeros_and_leave_the_cache_alone(
    rotary: bool, dtype: torch.dtype, launches: list[int]
) -> None:
    """Rows of padding hold NaN, and their slot is −1."""
    for contexts, padding in (((17, 300, 0), 2), ((100,), 7), ((0,), 1)):
        check(replace(decoding(contexts), dtype=dtype, padding=padding, empty=padding), rotary=rotary)
    for padding in (1, 60):
        case = replace(decoding(draw_contexts(40), FEW_HEADS), dtype=dtype, padding=padding, empty=padding)
        check(case, rotary=rotary)
    assert len(launches) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [32, 33, 40, 64, 65, 100, 248])
def test_many_sequences(sequences: int, launches: list[int]) -> None:
    """From 33 on, splits beyond the first are listed."""
    case = decoding(draw_contexts(sequences), FEW_HEADS)
    check(case, rotary=True)
    check(case, rotary=True, splits=8, share=32)
    check(case, rotary=True, splits=1)
    assert launches == [sequences] * 3


@pytest.mark.gpu
def test_long_contexts_in_a_crowd(launches: list[int]) -> None:
    for most in (5000, 8000):
        check(decoding(draw_contexts(40, most), replace(LLAMA, heads=4, kv_heads=1)), rotary=True)
    assert len(launches) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [2, 8, 64])
def test_more_listed_splits_than_programs(splits: int, launches: list[int]) -> None:
    contexts = [random.SystemRandom().randrange(2900, 3000) for _ in range(100)]
    check(decoding(contexts, FEW_HEADS), splits=splits, share=1)
    check(decoding([3000] * 100, FEW_HEADS), rotary=True, splits=splits, share=1)
    assert launches == [100] * 2


@pytest.mark.gpu
@CUT
@TURNED
def test_several_tokens_among_empty_sequences(rotary: bool, plan: dict[str, int], launches: list[int]) -> None:
    """As many tokens as sequences, but not one each: token by token, each sees those before it."""
    few = evened(replace(FEW_HEADS, sequences=SEVERAL[:4]))
    assert few.empty <= 7
    check(few, rotary=rotary, **plan)
    many = evened(replace(FEW_HEADS, sequences=SEVERAL))
    assert many.empty + len(SEVERAL) > hopper_decode.MOST_PLACED
    check(many, rotary=rotary, **plan)
    check(evened(replace(FEW_HEADS, sequences=SEVERAL, padding=50)), rotary=rotary, **plan)
    assert len(launches) == 3


@pytest.mark.gpu
@CUT
@TURNED
def test_few_tokens_beside_prompts(rotary: bool, plan: dict[str, int], launches: list[int]) -> None:
    """Up to four for groups of four; prompts go elsewhere."""
    case = replace(FEW_HEADS, sequences=MIXED)
    check(case, rotary=rotary, **plan)
    check(replace(case, padding=19, empty=3), rotary=rotary, **plan)
    check(replace(case, sequences=(*MIXED, *((7 * i, i % 6) for i in range(80))), padding=5), rotary=rotary, **plan)
    assert len(launches) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("case", [replace(FEW_HEADS, dtype=torch.float16), replace(LLAMA, heads=4, kv_heads=4)])
def test_few_tokens_beside_prompts_in_other_kinds(case: Case, launches: list[int]) -> None:
    """In float16, whose prompts go to the general kernel, and up to 16 tokens of heads that share no keys."""
    for plan in ({}, {"splits": 8, "share": 1}):
        check(replace(case, sequences=MIXED, padding=2), **plan)
    assert len(launches) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("sequence", [(1050, 3), (1500, 2), (16, 4), (0, 4)], ids=str)
def test_speculation_of_one_sequence(sequence: tuple[int, int], launches: list[int]) -> None:
    """A single sequence is cut into 64 parts, of which the last ones may have no page."""
    check(replace(LLAMA, sequences=(sequence,)), rotary=True)
    check(replace(LLAMA, sequences=(sequence, (0, 300), (530, 1))), rotary=True)
    assert len(launches) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        decoding([8256]),
        decoding(CONTEXTS),
        decoding(draw_contexts(100), FEW_HEADS),
        evened(replace(FEW_HEADS, sequences=SEVERAL)),
        replace(FEW_HEADS, sequences=MIXED, padding=3),
    ],
    ids=["one", "few", "many", "several", "mixed"],
)
def test_calls_repeat_to_the_bit(case: Case, launches: list[int]) -> None:
    """Whichever program ends last merges, and leaves the counters zero: a race would show here, if not always."""
    check(case, rotary=True, repeats=10)
    assert len(launches) == 11


@pytest.mark.gpu
def test_keys_and_values_of_a_block_beside_each_other(launches: list[int]) -> None:
    """As one pool for both has them: blocks of a cache lie twice as far apart."""
    case = decoding(CONTEXTS)
    tensors = list(draw(case))
    tensors[3], tensors[4] = torch.stack(tensors[3:5], 1).unbind(1)
    expected, caches = refer(tensors)
    compare(run(tensors), expected, case)
    compare_caches(tensors[3:5], caches, rotary=False)
    assert launches == [12]


@pytest.mark.gpu
@pytest.mark.parametrize("more", [0, 4, 8])
def test_rows_that_threads_cannot_read_whole_are_still_right(more: int, launches: list[int]) -> None:
    """Tokens that begin 8 bytes past a multiple of 16 go to the general kernel, and give the same."""
    case = decoding(CONTEXTS)
    tensors = list(draw(case))
    wide = torch.empty(len(tensors[1]), 8 * 128 + more, dtype=torch.bfloat16, device=DEVICE)
    tensors[1] = wide[:, : 8 * 128].unflatten(1, (8, 128)).copy_(tensors[1])
    expected, caches = refer(tensors)
    compare(run(tensors), expected, case)
    compare_caches(tensors[3:5], caches, rotary=False)
    assert bool(launches) == (more != 4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cases",
    [
        [
            decoding((2000, 5, 40, 0)),
            replace(decoding((290, 17)), padding=2, empty=2),
            replace(LLAMA, sequences=((1050, 3),), padding=1, empty=3),
            decoding((1999, 16, 1, 530)),
        ],
        [
            decoding((2500, *range(0, 780, 20)), FEW_HEADS),
            replace(decoding((0, 2400, 100), FEW_HEADS), padding=37, empty=37),
            evened(replace(FEW_HEADS, sequences=((1050, 30), (0, 0), (600, 5)), padding=5)),
            decoding((*range(39), 2400), FEW_HEADS),
        ],
    ],
    ids=["few", "many"],
)
def test_a_captured_graph_follows_the_batch(cases: list[Case], launches: list[int]) -> None:
    """The same graph serves other lengths, pages and paddings: nothing of the batch was read at capture."""
    buffers = draw(cases[0])
    angles = draw_angles(len(buffers[0]))
    call = partial(
        rotary_paged_attention, *buffers[:3], *angles, *buffers[3:], SCALE, arrivals=kernels.new_arrivals(DEVICE)
    )
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for case in [*cases[1:], *cases]:
        batch = draw(case)
        expected, caches = refer(batch, angles)
        for buffer, tensor in zip(buffers, batch, strict=True):
            buffer[tuple(slice(n) for n in tensor.shape)] = tensor
        graph.replay()
        compare(output, expected, case)
        compare_caches(
            [buffer[: len(cache)] for buffer, cache in zip(buffers[3:5], caches, strict=True)], caches, rotary=True
        )
    assert launches == [len(buffers[0])] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [(3000, 0, 777), (100,), tuple(range(0, 600, 15))], ids=["few", "one", "many"])
def test_it_waits_for_what_the_kernel_ahead_writes(contexts: tuple[int, ...], launches: list[int]) -> None:
    """Queries and keys are written just before each of 20 calls, and over again just after it."""
    case = decoding(contexts)
    query, key, *rest = draw(case)
    sources = [(torch.randn_like(query), torch.randn_like(key)) for _ in range(20)]
    expected = [refer((*source, *rest))[0] for source in sources]
    arrivals = kernels.new_arrivals(DEVICE)

    def chain() -> list[torch.Tensor]:
        outputs = []
        for source in sources:
            query.copy_(source[0])
            key.copy_(source[1])
            outputs.append(run((query, key, *rest), None, arrivals))
            query.fill_(torch.nan)
            key.fill_(torch.nan)
        return outputs

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain()
    for _ in range(5):
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        for output, wanted in zip(outputs, expected, strict=True):
            compare(output, wanted, case)
    assert not arrivals.any()
    assert len(launches) == 40


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [(3000, 0, 777), (100,), tuple(range(0, 600, 15))], ids=["few", "one", "many"])
def test_calls_that_overlap_wait_for_each_other(contexts: tuple[int, ...], launches: list[int]) -> None:
    """Each has the output of the one before for its queries, and the keys of all are in the same places."""
    query, *rest = draw(decoding(contexts))
    arrivals = kernels.new_arrivals(DEVICE)

    def chain(*, synchronise: bool) -> torch.Tensor:
        hidden = query
        for _ in range(20):
            hidden = run((hidden, *rest), None, arrivals)
            if synchronise:
                torch.cuda.synchronize()
        return hidden

    expected = chain(synchronise=True)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = chain(synchronise=False)
    for _ in range(20):
        output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(output, expected)
    assert not arrivals.any()
    assert len(launches) == 40
