"""Products of cuBLAS by measured algorithms: the choice and its file anywhere, the products on a GPU."""

from __future__ import annotations

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .triton_device import check_replays, kernels_for_device, pretend

with kernels_for_device():
    from enginery.kernels.triton import cublas
    from enginery.kernels.triton.cublas_choices import Choice, Choices, Family
    from enginery.kernels.triton.cublas_lt import Algorithm, CublasLt, Shape
    from enginery.kernels.triton.cublas_tiles import CLUSTERS, FILLED, MOST_WAVES, TILES, TRIED, WIDTHS, filling
    from enginery.kernels.triton.gpu import Gpu

SQUARE = Family(64, 64, torch.bfloat16)
NARROW = Family(64, 64, torch.float8_e4m3fn, scaled=True)


def choice(number: int, *, by_rows: bool = False) -> Choice:
    return Choice(Algorithm(bytes([number]) * 64, number), by_rows)


def test_rows_take_the_choice_of_the_next_larger_number() -> None:
    choices = Choices()
    choices.keep(SQUARE, 128, choice(1))
    choices.keep(SQUARE, 512, choice(2))
    assert [choices.nearest(SQUARE, rows) for rows in (1, 128, 129, 512)] == [choice(1)] * 2 + [choice(2)] * 2
    assert choices.nearest(SQUARE, 513) is None
    assert choices.nearest(NARROW, 1) is None
    assert choices.known(SQUARE, 128)
    assert not choices.known(SQUARE, 129)


def test_choices_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "devices" / "gpu.json"
    choices = Choices(path)
    choices.keep(SQUARE, 128, choice(1))
    choices.keep(NARROW, 96, choice(3, by_rows=True))
    choices.write()
    again = Choices(path)
    assert (again.nearest(SQUARE, 100), again.nearest(NARROW, 1)) == (choice(1), choice(3, by_rows=True))
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]


def test_processes_keep_each_others_choices(tmp_path: Path) -> None:
    one, other = Choices(tmp_path / "gpu.json"), Choices(tmp_path / "gpu.json")
    one.keep(SQUARE, 128, choice(1))
    other.keep(SQUARE, 128, choice(2))
    other.keep(NARROW, 96, choice(3))
    one.write()
    other.write()
    again = Choices(tmp_path / "gpu.json")
    assert (again.nearest(SQUARE, 128), again.nearest(NARROW, 96)) == (choice(2), choice(3))
    one.write()
    assert Choices(tmp_path / "gpu.json").nearest(NARROW, 96) == choice(3)


def entry(**damage: object) -> str:
    sound = {"features": 64, "depth": 64, "dtype": "bfloat16", "scaled": False, "rows": 1, "algorithm": "01" * 64}
    return json.dumps([{**sound, "workspace": 1, "by_rows": False, **damage}])


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{}", "[1]", '[{"features": 1}]', '[{"dtype": "no"}]', "\x00",
        *(entry(dtype=name) for name in ("no", "nn", "__dict__", "float64", 7, [])),
        *(entry(algorithm=code) for code in ("", "01" * 63, "01" * 65, "zz" * 64)),
        entry(rows=float("inf")),
    ],
)  # fmt: skip
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    choices = Choices(path)
    assert choices.nearest(SQUARE, 1) is None
    choices.keep(SQUARE, 1, choice(1))
    choices.write()
    assert len(json.loads(path.read_text())) == 1


def test_where_nothing_can_be_written_choices_last_as_long_as_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    choices = Choices(tmp_path / "file" / "gpu.json")
    choices.keep(SQUARE, 1, choice(1))
    choices.write()
    assert choices.nearest(SQUARE, 1) == choice(1)


class Library:
    """Proposes two algorithms, the second of which does not take more than 100 rows."""

    def __init__(self) -> None:
        self.multiplied: list[tuple[Shape, Algorithm]] = []

    def algorithms(self, shape: Shape, most_workspace: int) -> list[Algorithm]:
        return [choice(1).algorithm, choice(2).algorithm][: 2 if most_workspace else 1]

    def accepts(self, shape: Shape, algorithm: Algorithm) -> bool:
        return algorithm != choice(2).algorithm or shape.rows <= 100

    def with_tile(self, shape: Shape, algorithm: Algorithm, tile: int, option: int, cluster: int) -> Algorithm | None:
        """Of five options, only the first of which does what it should."""
        size = cublas.MOST_WORKSPACE + 1 if option == 3 else 0
        return Algorithm(bytes([tile, option, cluster]), size) if option < 6 and cluster < 5 else None

    def multiply(self, shape, algorithm, input, weight, scales) -> torch.Tensor:
        self.multiplied.append((shape, algorithm))
        result = torch.nn.functional.linear(input.float(), weight.float()).to(shape.result)
        option = algorithm.code[1] if len(algorithm.code) == 3 else 0
        if option == 1:  # does not write a column
            result[:, -1] = self.memory[:, -1]
        if option == 2:
            raise RuntimeError("cublasLtMatmul failed with status 15")
        self.memory = result  # where the next one's result will lie
        return result


@given(st.data(), st.sampled_from([1, 78, 114, 132]), st.integers(1, 512))
def test_tiles_fill_the_gpu(data: st.DataObject, processors: int, rows: int) -> None:
    features = data.draw(st.integers(1, 256 * MOST_WAVES * processors))
    sides = {number: (height, width) for height in TILES for width, number in zip(WIDTHS, TILES[height], strict=True)}
    full: dict[int, tuple[int, int]] = {}
    for number, (height, width) in sides.items():
        tiles = math.ceil(features / height) * math.ceil(rows / width)
        waves = math.ceil(tiles / processors)
        if waves <= MOST_WAVES and tiles >= FILLED * waves * processors:
            full[number] = (waves * height * width, -height * width)
    found = filling(rows, features, processors)
    assert len(found) == min(TRIED, len(full))
    assert [full[number] for number in found] == sorted(full.values())[: len(found)]


def test_tiles_of_decoding() -> None:
    for rows in (224, 256):
        # Two waves, or four; those of 256 would be 1.7 of two.
        assert filling(rows, 28672, 132) == [TILES[224][1], TILES[112][1]]
        assert filling(rows, 4096, 132) == [TILES[64][1], TILES[128][0]]
    assert filling(8192, 28672, 132) == []


def measure_tiles(monkeypatch: pytest.MonkeyPatch, *gpu: Any) -> list[Choice]:
    """What is measured of a product of 128 rows and 192 features on a GPU of so many multiprocessors and such
    capability."""
    measured: list[Choice] = []
    monkeypatch.setattr(cublas, "fastest", lambda choices, run, weights: measured.extend(choices))
    monkeypatch.setattr(
        cublas, "operands", lambda family, rows, device: (torch.randn(rows, 64).bfloat16(), [torch.randn(192, 64)])
    )
    pretend(monkeypatch, cublas, *gpu)
    ours = cublas.Cublas(Library(), Choices())
    with ours.measuring():
        ours.linear(torch.randn(128, 64).bfloat16(), torch.randn(192, 64).bfloat16())
    return measured


def test_what_fills_the_gpu_is_measured_too_if_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = filling(128, 192, 3)
    assert len(tiles) == TRIED
    assert measure_tiles(monkeypatch, 3, (9, 0)) == [
        choice(1), choice(2),
        *(Choice(Algorithm(bytes([tile, 0, cluster]), 0)) for tile in tiles for cluster in CLUSTERS if cluster < 5),
    ]  # fmt: skip
    assert measure_tiles(monkeypatch, 3, (8, 0)) == [choice(1), choice(2)]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("status 15")], ids=["memory", "other"]
)
def test_a_product_that_cannot_be_measured_is_left_to_torch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fail(family: Family, rows: int, device: torch.device) -> None:
        asked.append(rows)
        raise error

    monkeypatch.setattr(cublas, "operands", fail)
    ours = cublas.Cublas(Library(), Choices())
    input, weight = torch.randn(128, 64).bfloat16(), torch.randn(192, 64).bfloat16()
    with ours.measuring():
        for _ in range(2):
            assert torch.equal(ours.linear(input, weight), torch.nn.functional.linear(input, weight))
    assert asked == [128]


class Clock:
    """Of a GPU that takes for each algorithm as many milliseconds as its workspace has bytes; ten times as many when it
    is timed for the second time, and whatever the host takes, if that is longer than the GPU was kept busy.

    `stalls`: every so many times, the host takes for ever.
    """

    def __init__(self, host: int, stalls: int = 0) -> None:
        self.host = host
        self.stalls = stalls
        self.delays: list[int] = []
        self.current = choice(0)
        self.timed: Counter[Choice] = Counter()

    def sleep(self, cycles: int) -> None:
        self.delays.append(cycles)

    def run(self, each: Choice, weight: torch.Tensor) -> None:
        self.current = each

    @property
    def is_late(self) -> bool:
        stalled = self.stalls and len(self.delays) % self.stalls == 0
        return bool(stalled) or self.host > self.delays[-1]

    def elapsed(self) -> float:
        if self.is_late:
            return 0.001
        self.timed[self.current] += 1
        return self.current.algorithm.workspace * (10 if self.timed[self.current] == 2 else 1)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        return SimpleNamespace(
            record=lambda: None, synchronize=lambda: None, query=lambda: self.is_late,
            elapsed_time=lambda end: self.elapsed(),
        )  # fmt: skip


@pytest.mark.parametrize(("host", "longest"), [(0, 1_000_000), (10_000_000, 16_000_000), (10**9, 64_000_000)])
def test_a_gpu_that_waits_for_the_host_is_timed_again(host: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(host)
    monkeypatch.setattr(torch.cuda, "_sleep", clock.sleep)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    choices = [choice(number) for number in (7, 2, 9, 4, 5, 6)]
    assert cublas.fastest([], clock.run, []) is None
    assert cublas.fastest(choices, clock.run, [torch.zeros(1)]) == (None if host > longest else choices[1])
    assert max(clock.delays) == longest
    if host > longest:  # no other is tried
        assert len(clock.delays) == 8
    else:
        again = {each for each, times in clock.timed.items() if times > 1}
        assert again == set(map(choice, (2, 4, 5, 6)))
        assert {clock.timed[each] for each in again} == {1 + cublas.TURNS}


def test_a_host_that_stalls_now_and_then_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0, stalls=3)
    monkeypatch.setattr(torch.cuda, "_sleep", clock.sleep)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    choices = [choice(number) for number in (7, 2, 9, 4, 5, 6)]
    assert cublas.fastest(choices, clock.run, [torch.zeros(1)]) == choices[1]
    assert set(clock.delays) == {cublas.DELAY}


def test_what_could_not_be_timed_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cublas, "fastest", lambda choices, run, weights: None)
    monkeypatch.setattr(cublas, "operands", lambda *_: (torch.ones(7, 64).bfloat16(), [torch.ones(64, 64)]))
    ours = cublas.Cublas(Library(), Choices(tmp_path / "gpu.json"))
    with ours.measuring():
        ours.linear(torch.randn(7, 64).bfloat16(), torch.randn(64, 64).bfloat16())
    assert json.loads((tmp_path / "gpu.json").read_text()) == []


def test_a_product_is_measured_once_and_only_while_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int]] = []

    def fastest(choices, run, weights) -> Choice:
        run(choices[0], weights[0])
        measured.append((len(choices), library.multiplied[-1][0].rows))
        return choices[-1]

    library = Library()
    monkeypatch.setattr(cublas, "fastest", fastest)
    monkeypatch.setattr(
        cublas, "operands", lambda family, rows, device: (torch.ones(rows, 64).bfloat16(), [torch.ones(64, 64)])
    )
    ours = cublas.Cublas(library, Choices())
    weight = torch.randn(64, 64).bfloat16()
    ours.linear(torch.randn(7, 64).bfloat16(), weight)
    assert not library.multiplied
    with ours.measuring():
        for _ in range(2):
            for rows in (100, 200):
                ours.linear(torch.randn(rows, 64).bfloat16(), weight)
    assert measured == [(2, 100), (2, 200)]
    before = len(library.multiplied)
    input = torch.randn(7, 64).bfloat16()
    found = ours.linear(input, weight)
    assert torch.equal(found, torch.nn.functional.linear(input.float(), weight.float()).bfloat16())
    assert library.multiplied[before:] == [(Shape(7, 64, 64, torch.bfloat16), choice(2).algorithm)]
    # The choice for 200 rows is one that the library does not accept: torch does these.
    ours.linear(torch.randn(150, 64).bfloat16(), weight)
    ours.linear(input, weight, torch.zeros(64).bfloat16())
    assert len(library.multiplied) == before + 1


def test_what_other_threads_multiply_meanwhile_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = cublas.Cublas(Library(), Choices())
    measured: list[int] = []
    monkeypatch.setattr(ours, "_measure", lambda lt, family, rows, device: measured.append(rows))
    weight = torch.randn(64, 64).bfloat16()
    with ours.measuring(), ThreadPoolExecutor(1) as other:
        ours.linear(torch.randn(100, 64).bfloat16(), weight)
        other.submit(ours.linear, torch.randn(200, 64).bfloat16(), weight).result()
    assert measured == [100]


def test_operands_that_are_none_of_an_algorithm_are_left_to_torch() -> None:
    library, choices = Library(), Choices()
    choices.keep(SQUARE, 128, choice(1))
    choices.keep(Family(64, 64, torch.float64), 128, choice(1))
    ours, weight = cublas.Cublas(library, choices), torch.randn(64, 64).bfloat16()
    one = torch.randn(1, 64).bfloat16()
    torch.testing.assert_close(
        ours.linear(one.expand(7, 64), weight), torch.nn.functional.linear(one, weight).expand(7, 64)
    )
    overlapping = torch.randn(512).bfloat16().as_strided((7, 64), (32, 1))
    torch.testing.assert_close(ours.linear(overlapping, weight), torch.nn.functional.linear(overlapping, weight))
    assert ours.linear(torch.empty(0, 64).bfloat16(), weight).shape == (0, 64)
    assert ours.linear(torch.randn(7, 64).double(), weight.double()).dtype == torch.float64
    assert ours.linear(one, weight[:0]).shape == (1, 0)
    for wrong in (torch.randn(7, 64), torch.randn(7, 32).bfloat16()):
        with pytest.raises(RuntimeError):
            ours.linear(wrong, weight)
    assert not library.multiplied
    ours.linear(one, weight)
    assert len(library.multiplied) == 1


def test_what_cublas_proposes_nothing_for_is_asked_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Shape] = []

    class Silent(Library):
        def algorithms(self, shape: Shape, most_workspace: int) -> list[Algorithm]:
            asked.append(shape)
            return []

    monkeypatch.setattr(cublas, "operands", lambda *_: (torch.ones(7, 64).bfloat16(), [torch.ones(64, 64)]))
    ours = cublas.Cublas(Silent(), Choices(tmp_path / "gpu.json"))
    input, weight = torch.randn(7, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    with ours.measuring():
        for _ in range(2):
            assert torch.equal(ours.linear(input, weight), torch.nn.functional.linear(input, weight))
    assert asked == [Shape(7, 64, 64, torch.bfloat16)] * 2  # with much workspace, and with none
    assert json.loads((tmp_path / "gpu.json").read_text()) == []


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(*shape, device="cuda")
    return (values * 100).clamp(-448, 448).to(dtype) if dtype.itemsize == 1 else values.to(dtype)


def close(found: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> None:
    left, right = input.double(), weight.double()
    for scale in scales[:1]:
        left = left * scale.double().view(-1, 1)
    for scale in scales[1:]:
        right = right * scale.double().view(-1, 1)
    expected = left @ right.T
    # A result in bfloat16; a matrix unit may sum 8-bit products with 14 bits.
    bound = expected.abs() * 2**-7 + (left.abs() @ right.abs().T) * (2**-9 if weight.element_size() == 1 else 2**-20)
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(65, 512, 1024), (200, 4096, 14336), (1000, 96, 4096)], ids=str)
def test_every_algorithm_multiplies(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, features, depth = shape
    lt, input, weight = CublasLt(), randn(rows, depth, dtype=dtype), randn(features, depth, dtype=dtype)
    ones = [torch.ones(1, device="cuda")] * 2
    by_rows = [torch.rand(size, device="cuda") for size in (rows, features)]
    for scales in (ones, by_rows) if dtype.itemsize == 1 else (ones,):
        product = Shape(rows, features, depth, dtype, scales is by_rows)
        algorithms = lt.algorithms(product, 32 << 20)
        assert algorithms or scales is by_rows
        for algorithm in algorithms:
            close(lt.multiply(product, algorithm, input, weight, scales), input, weight, *scales)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(256, 4096, 14336), (256, 28672, 4096), (384, 4096, 512)], ids=str)
def test_tiles_multiply_as_many_rows_as_they_were_chosen_for_and_fewer(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the tiles are those of kernels for Hopper")
    rows, features, depth = shape
    lt, input, weight = CublasLt(), randn(rows, depth, dtype=dtype), randn(features, depth, dtype=dtype)
    family = Family.of(weight)
    found = list(cublas.tiled(lt, family, rows, Gpu.of(weight.device)))
    assert found
    for each in found:
        choices = Choices()
        choices.keep(family, rows, each)
        ours = cublas.Cublas(lt, choices)
        multiply = ours.unscaled if dtype.itemsize == 1 else ours.linear
        for part in (input, input[:-3], input[: rows // 2]):
            close(multiply(part, weight), part, weight)
        assert ours._products[family, rows] is not None


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [65, 128, 700])
def test_measured_products(rows: int, has_bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    first, second = cublas.Cublas(), cublas.Cublas()
    first.open(device)
    weight, narrow = randn(512, 1024, dtype=torch.bfloat16), randn(512, 1024, dtype=torch.float8_e4m3fn)
    bias = torch.randn(512, device="cuda").bfloat16() if has_bias else None
    offset = 0 if bias is None else bias.double()

    def check(ours: cublas.Cublas, rows: int) -> None:
        wide = randn(rows, 2048, dtype=torch.bfloat16)[:, 1024:]
        found = ours.linear(wide, weight, bias)
        if bias is None:
            close(found, wide, weight)
        else:  # by torch; rounded with the bias
            expected = wide.double() @ weight.double().T + offset
            torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=0.3)
        input, scales = randn(rows, 1024, dtype=torch.float8_e4m3fn), (torch.rand(rows), torch.rand(512))
        row_scale, scale = (each.to(device) for each in scales)
        close(ours.unscaled(input, narrow), input, narrow)
        found = ours.float8(input, row_scale, narrow, scale, bias, torch.bfloat16)
        if bias is None:
            close(found, input, narrow, row_scale, scale)
        else:
            plain = ours.float8(input, row_scale, narrow, scale, None, torch.bfloat16)
            torch.testing.assert_close(found.double(), plain.double() + offset, rtol=2**-6, atol=0.1)

    with first.measuring():
        check(first, rows)
    check(first, rows - 3)
    second.open(device)
    assert second._choices.known(Family.of(weight), rows) == (not has_bias)
    assert second._choices.known(Family.of(narrow, scaled=True), rows)
    check(second, rows)


@pytest.mark.gpu
def test_a_graph_can_hold_a_measured_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path))
    ours, source = cublas.Cublas(), torch.zeros(200, 14336, device="cuda", dtype=torch.bfloat16)
    ours.open(torch.device("cuda", torch.cuda.current_device()))
    weight = randn(4096, 14336, dtype=torch.bfloat16)
    with ours.measuring():
        ours.linear(source, weight)
    check_replays(
        lambda: ours.linear(source, weight), lambda: source.copy_(randn(200, 14336, dtype=torch.bfloat16)), times=5
    )
