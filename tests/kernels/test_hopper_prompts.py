"""The prompts' kernel for Hopper: when it is chosen, and on such a GPU its results against the reference in float64.

Gluon has no interpreter: without a GPU its arithmetic is only compiled (`test_triton_compiles.py`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from enginery.ops.paged_attention import paged_attention_reference
from enginery.ops.rotary_paged_attention import rotary_paged_attention_reference

from .test_triton_paged_attention import Case, build
from .triton_device import DEVICE, kernels_for_device

with kernels_for_device():
    from enginery.kernels.triton import attention_plan
    from enginery.kernels.triton import paged_attention as kernels
    from enginery.kernels.triton.gpu import Gpu
    from enginery.kernels.triton.rotary import rotary_paged_attention

if kernels.hopper_prompts is None:
    pytest.skip("the kernel is written for Triton 3.6", allow_module_level=True)
hopper_prompts = kernels.hopper_prompts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

H200 = Gpu(132, (9, 0))
SCALE = 128**-0.5
LLAMA = Case(((0, 0),), heads=32, kv_heads=8, dk=128, dv=128, dtype=torch.bfloat16)
SMALL = replace(LLAMA, sequences=((5, 1), (16, 20)), heads=2, kv_heads=1)


# When it is chosen


def programs(gpu: Gpu = H200, tokens: int = 900, width: int = 128, itemsize: int = 2, sequences: int = 5) -> int:
    return kernels.plan_launch(gpu, tokens, sequences, 8192, 8, 4, width, itemsize).hopper_programs


def test_plans_for_hopper_have_a_program_on_each_multiprocessor() -> None:
    assert programs() == 132
    assert programs(Gpu(78, (9, 0))) == 78


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_no_other_gpu_has_its_matrix_units(capability: tuple[int, int]) -> None:
    assert programs(Gpu(132, capability)) == 0


@pytest.mark.parametrize("shape", [{"width": 64}, {"width": 256}, {"itemsize": 4}], ids=str)
def test_plans_for_other_sizes_keep_to_the_general_kernel(shape: dict[str, int]) -> None:
    assert programs(**shape) == 0


def test_another_triton_keeps_to_the_general_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "hopper_prompts", None)
    assert programs() == 0


def test_a_cpu_has_none() -> None:
    assert not attention_plan.runs_hopper_kernels(Gpu.of(torch.device("cpu")))


class Launcher:
    """Stands for a kernel: notes its launches."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self.launched.append(self.name)


def kernels_of(case: Case, monkeypatch: pytest.MonkeyPatch, *, page: int = 16, **changes: Any) -> list[str]:
    """Those that would have a case on an H200, with pages of another size too; none of them runs.

    The plan is that of a plain case of 16 bits but for the `changes`: what the kernels do not take, the call finds.
    """
    launched: list[str] = []
    for name in ("write_cache", "attend_short", "attend_long"):
        monkeypatch.setattr(kernels, name, Launcher(name, launched))
    for module, name in (("hopper_decode", "attend_few"), ("hopper_prompts", "attend_prompts")):
        double = SimpleNamespace(takes=getattr(kernels, module).takes, launch=Launcher(name, launched)[()])
        monkeypatch.setattr(kernels, module, double)
    tensors, options = build(case, seed=1)
    caches = (cache.new_zeros(len(cache), case.kv_heads, page, cache.shape[3]) for cache in tensors[3:5])
    groups, width = case.heads // case.kv_heads, max(case.dk, case.dv)
    plan = kernels.plan_launch(H200, len(tensors[0]), len(tensors[6]), 64, case.kv_heads, groups, width, 2)
    plan = replace(plan, **changes)
    kernels.paged_attention(*tensors[:3], *caches, *tensors[5:], SCALE, **options, plan=plan)
    return launched


def test_prompts_go_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(SMALL, monkeypatch) == ["write_cache", "attend_few", "attend_prompts"]


def test_decoding_has_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(replace(SMALL, sequences=((5, 1), (16, 1))), monkeypatch) == ["attend_few"]


FEATURES_AND_SIZES: tuple[dict[str, Any], ...] = (
    {"window": 20},
    {"softcap": 1.5},
    {"sinks": True},
    {"alibi": True},
    {"dv": 64},
    {"dk": 64},
    {"dk": 120, "dv": 120},
)
"""Of calls that the kernels for Hopper do not take."""


@pytest.mark.parametrize("change", [*FEATURES_AND_SIZES, {"dtype": torch.float16}], ids=str)
def test_features_and_other_shapes_go_to_the_general_kernel(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of(replace(SMALL, **change), monkeypatch)[2:] == ["attend_long"]


def tensors_of(offset: int = 0, stride: int = 512, page: int = 16, gap: int = 0) -> list[torch.Tensor]:
    """query, key, value and the caches: rows of tokens `stride` apart, blocks `gap` more than a block."""
    rows = torch.zeros(8 * stride + 8, dtype=torch.bfloat16)[offset:].as_strided((8, 4, 128), (stride, 128, 1))
    pool = torch.zeros(3 * (2 * page * 128 + gap), dtype=torch.bfloat16)
    cache = pool.as_strided((3, 2, page, 128), (2 * page * 128 + gap, page * 128, 128, 1))
    return [rows, *rows.split((2, 2), 1), cache, cache]


def test_it_takes_rows_that_tma_can_address() -> None:
    assert hopper_prompts.takes(*tensors_of())
    assert hopper_prompts.takes(*tensors_of(offset=8, stride=520, gap=128))
    for change in ({"offset": 4}, {"stride": 516}, {"page": 32}, {"gap": 64}):
        assert not hopper_prompts.takes(*tensors_of(**change)), change


def test_rows_of_pages_lie_where_the_kernel_looks() -> None:
    """Keys and values of a block beside each other: a row is `block · stride + head · 16 + place`."""
    cache = torch.arange(5 * 2 * 3 * 16).view(5, 2, 3, 16, 1).expand(-1, -1, -1, -1, 128).contiguous()[:, 1]
    rows = hopper_prompts.rows_of_pages(cache)
    stride = cache.stride(0) // 128
    for block, head, place in itertools.product(range(5), range(3), range(16)):
        assert torch.equal(rows[block * stride + head * 16 + place], cache[block, head, place])
    assert len(rows) == 4 * stride + 3 * 16


# What it computes


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each launch of the kernel."""
    if not attention_plan.runs_hopper_kernels(Gpu.of(DEVICE)):
        pytest.skip("needs compute capability 9.0 and Triton 3.6")
    launch, tokens = hopper_prompts.launch, []

    def note_and_launch(query: torch.Tensor, *rest: Any) -> None:
        tokens.append(len(query))
        launch(query, *rest)

    monkeypatch.setattr(hopper_prompts, "launch", note_and_launch)
    return tokens


def draw(case: Case) -> tuple[torch.Tensor, ...]:
    """The call's tensors; what no sequence owns is NaN."""
    tensors, _ = build(case, seed=random.SystemRandom().randrange(1 << 30))
    owned = sum(new for _, new in case.sequences)
    for tensor in tensors[:3]:
        tensor[owned:] = torch.nan
    return tensors


def draw_angles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.rand(tokens, 64, device=DEVICE) * 6.3).repeat(1, 2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def widened(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in tensors]


def compare(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """Each row by itself: a wrong one among thousands must not drown. Rounding to bfloat16 is some 0.4 %, of single
    rows 2 %."""
    unit = 1.0 if case.dtype == torch.bfloat16 else 0.25
    owned = sum(new for _, new in case.sequences)
    assert not actual[owned:].any()
    difference, expected = actual[:owned].double() - expected[:owned], expected[:owned]
    assert not difference.isnan().any(), difference.isnan().any(-1).nonzero()[:5]
    rows = difference.norm(dim=-1) / expected.norm(dim=-1)
    assert rows.max() < 0.05 * unit, (rows > 0.05 * unit).nonzero()[:5]
    assert difference.norm() < 0.01 * unit * expected.norm()


def check(case: Case, *, rotary: bool = False, repeats: int = 1) -> None:
    tensors = draw(case)
    run, reference = kernels.paged_attention, paged_attention_reference
    if rotary:
        tensors = (*tensors[:3], *draw_angles(len(tensors[0])), *tensors[3:])
        run, reference = rotary_paged_attention, rotary_paged_attention_reference
    expected = reference(*widened(tensors), SCALE)
    actual = run(*tensors, SCALE)
    compare(actual, expected, case)
    for _ in range(repeats):
        assert torch.equal(run(*tensors, SCALE), actual)


RAGGED = ((0, 70), (50, 3), (7, 200), (16, 5), (100, 129), (777, 1), (777, 300), (128, 64))
MIXED = ((16, 17), (0, 2), (0, 128), (100, 256), (777, 33), (100, 4), (7, 65), (2000, 1), (0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("tokens", [2, 5, 63, 64, 65, 127, 128, 129, 200, 1000, 2048])
def test_a_prompt(tokens: int, rotary: bool, launches: list[int]) -> None:
    check(replace(LLAMA, sequences=((0, tokens),)), rotary=rotary)
    assert launches == [tokens] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("context", [0, 7, 16, 100, 777, 1024])
def test_a_prompt_after_its_context(context: int, rotary: bool, launches: list[int]) -> None:
    for tokens in (63, 65, 300, 1024):
        check(replace(LLAMA, sequences=((context, tokens),)), rotary=rotary)
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("sequences", [RAGGED, MIXED], ids=["ragged", "mixed"])
def test_prompts_among_decoding_sequences(sequences: tuple, rotary: bool, launches: list[int]) -> None:
    case = replace(LLAMA, sequences=sequences)
    check(case, rotary=rotary)
    check(replace(case, padding=19), rotary=rotary)
    check(replace(case, padding=300, empty=3), rotary=rotary)
    check(replace(case, sequences=((0, 0), *sequences, (0, 0), (5, 40))), rotary=rotary)
    assert launches


@pytest.mark.gpu
def test_more_sequences_than_lanes_of_a_warp(launches: list[int]) -> None:
    sequences = tuple((3 * i % 50, 1 + 7 * i % 90) for i in range(200))
    check(replace(LLAMA, sequences=sequences, empty=20))
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (7, 1), (28, 4), (64, 8), (20, 1)])
def test_other_numbers_of_heads(heads: int, kv_heads: int, launches: list[int]) -> None:
    """The group decides which sequences are left to the kernel of few tokens: up to 16 alone, 1 for groups of 20."""
    check(replace(LLAMA, heads=heads, kv_heads=kv_heads, sequences=MIXED), rotary=True)
    assert launches


@pytest.mark.gpu
def test_a_long_context(launches: list[int]) -> None:
    check(replace(LLAMA, heads=8, kv_heads=2, sequences=((6144, 2048), (3001, 999))))
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [((0, 2048),), RAGGED, MIXED], ids=["one", "ragged", "mixed"])
def test_calls_repeat_to_the_bit(sequences: tuple, launches: list[int]) -> None:
    """Two warpgroups and a copying warp share memory: a race would show here, if not always."""
    check(replace(LLAMA, sequences=sequences), repeats=50)
    assert len(launches) == 51


@pytest.mark.gpu
def test_keys_and_values_of_a_block_beside_each_other(launches: list[int]) -> None:
    """As one pool for both has them: blocks of a cache lie twice as far apart."""
    case = replace(LLAMA, sequences=RAGGED)
    tensors = list(draw(case))
    tensors[3], tensors[4] = torch.stack(tensors[3:5], 1).unbind(1)
    expected = paged_attention_reference(*widened(tensors), SCALE)
    compare(kernels.paged_attention(*tensors, SCALE), expected, case)
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 132])
def test_rows_that_tma_cannot_address_are_still_right(size: int, launches: list[int]) -> None:
    """Tokens that begin 8 bytes past a multiple of 16 go to the general kernel, and give the same."""
    case = replace(LLAMA, sequences=RAGGED)
    tensors = list(draw(case))
    wide = torch.empty(len(tensors[1]), 8 * 128 + size - 128, dtype=torch.bfloat16, device=DEVICE)
    tensors[1] = wide[:, : 8 * 128].unflatten(1, (8, 128)).copy_(tensors[1])
    expected = paged_attention_reference(*widened(tensors), SCALE)
    compare(kernels.paged_attention(*tensors, SCALE), expected, case)
    assert bool(launches) == (size == 128)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_batch(launches: list[int]) -> None:
    """The same graph serves other lengths, pages and paddings: nothing of the batch was read at capture."""
    buffers = draw(replace(LLAMA, sequences=((0, 300), (777, 100), (100, 200), (30, 1)), padding=7))
    angles = draw_angles(len(buffers[0]))
    call = (*buffers[:3], *angles, *buffers[3:], SCALE)
    rotary_paged_attention(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = rotary_paged_attention(*call)
    for sequences, empty in (
        (((16, 129), (300, 65)), 2),
        (((0, 608),), 3),
        (((700, 3), (0, 2), (64, 64), (5, 301)), 0),
    ):
        case = replace(LLAMA, sequences=sequences, empty=empty)
        case = replace(case, padding=608 - sum(new for _, new in sequences))
        batch = draw(case)
        expected = rotary_paged_attention_reference(*widened((*batch[:3], *angles, *batch[3:])), SCALE)
        for buffer, tensor in zip(buffers, batch, strict=True):
            buffer[tuple(slice(n) for n in tensor.shape)] = tensor
        graph.replay()
        compare(output, expected, case)
    assert launches == [608, 608]
