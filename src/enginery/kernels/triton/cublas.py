"""Products of cuBLAS by the algorithms that were measured to be the fastest on this GPU.

cuBLAS has a dozen algorithms for a product and guesses the best by its shape. For the four products of a layer of 4096
and 14336 features its guesses cost, in bfloat16 on an H200, 4 % of their time for 128 rows, 8 % for 1,024 or 2,048 and
28 % for 448. So when an engine is built, `Cublas.measuring` times what cuBLAS proposes for the sizes of its steps, and
what it has beside that (`cublas_tiles.py`). The choices are kept in a file of the cache directory, one for each GPU and
version of cuBLAS, which later processes read.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch

from enginery.device_facts import path_of
from enginery.kernels.triton.cublas_choices import Choice, Choices, Family
from enginery.kernels.triton.cublas_lt import Algorithm, CublasLt, Shape, takes
from enginery.kernels.triton.cublas_tiles import CLUSTERS, OPTIONS, filling
from enginery.kernels.triton.float8 import float8_product, scaled, unscaled_product
from enginery.kernels.triton.gpu import Gpu

MOST_WORKSPACE = 32 << 20
"""bytes; what torch gives cuBLAS on a Hopper"""
DELAY, LONGEST_DELAY = 1_000_000, 64_000_000
"""Cycles for which the GPU is kept busy while the host launches what is timed: half a millisecond to 32. Compilers keep
the host busy meanwhile, and a GPU that waited for it would time the host."""
LAUNCHES, FINALISTS, FINAL_LAUNCHES = 3, 4, 8
TURNS = 3
"""Times that each finalist is timed, one after another; the least counts."""
ALIKE = 2**-4
"""What results of two algorithms may differ by, of the greatest: they add up in another order."""


@dataclass(frozen=True)
class Product:
    """How a product is done."""

    lt: CublasLt
    shape: Shape
    algorithm: Algorithm

    @classmethod
    def of(cls, lt: CublasLt, family: Family, rows: int, choice: Choice) -> Product:
        shape = Shape(rows, family.features, family.depth, family.dtype, choice.by_rows)
        return cls(lt, shape, choice.algorithm)

    @property
    def is_possible(self) -> bool:
        """An algorithm that was chosen for more rows may not take these."""
        return self.lt.accepts(self.shape, self.algorithm)

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        return self.lt.multiply(self.shape, self.algorithm, input, weight, scales)


class Cublas:
    """What the operators call. Without a library or choices, torch does the products, by cuBLAS's guesses."""

    def __init__(self, lt: CublasLt | None = None, choices: Choices | None = None) -> None:
        self._lt = lt
        self._choices = choices or Choices()
        self._products: dict[tuple[Family, int], Product | None] = {}
        self._ones: dict[torch.device, torch.Tensor] = {}
        self._measurer: int | None = None

    def open(self, device: torch.device) -> None:
        """From now on by the choices of earlier processes, if torch has brought the library."""
        self._one(device)
        with suppress(OSError, AttributeError, RuntimeError):
            self._lt = CublasLt()
            name = "-".join(torch.cuda.get_device_name(device).lower().split())
            self._choices = Choices(path_of(f"{name}-cublas-tiles-{self._lt.version}"))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within, each product of this thread is measured before it is done for the first time; then the choices are
        written. Another thread may serve, or capture what must not be interrupted."""
        self._measurer = threading.get_ident()
        try:
            yield
        finally:
            self._measurer = None
            self._choices.write()

    def linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """input `[M, K]`, weight `[N, K]` -> input · weightᵀ + bias `[M, N]`, of their dtype."""
        product = None if bias is not None else self._product(input, weight)
        return torch.nn.functional.linear(input, weight, bias) if product is None else product(input, weight)

    def unscaled(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """input `[M, K]`, weight `[N, K]`, both float8 -> input · weightᵀ `[M, N]` in bfloat16."""
        product, one = self._product(input, weight), self._one(input.device)
        return unscaled_product(input, weight, one) if product is None else product(input, weight, one, one)

    def float8(
        self,
        input: torch.Tensor,
        input_scale: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The contract of `float8_product`."""
        product = None if dtype != torch.bfloat16 else self._product(input, weight, scaled=True)
        one = self._one(input.device)
        if product is None:
            return float8_product(input, input_scale, weight, scale, bias, dtype, one)
        if product.shape.by_rows:
            result = product(input, weight, input_scale, scale.expand(len(weight)).contiguous())
            return result if bias is None else result.add_(bias)
        return scaled(product(input, weight, one, one), input_scale, scale, bias)

    def _one(self, device: torch.device) -> torch.Tensor:
        """The number 1: cuBLAS wants scales on the device."""
        if device not in self._ones:
            self._ones[device] = torch.ones((), device=device)
        return self._ones[device]

    def _product(self, input: torch.Tensor, weight: torch.Tensor, *, scaled: bool = False) -> Product | None:
        """None: torch does it."""
        if self._lt is None or not takes(input, weight):
            return None
        family, rows = Family.of(weight, scaled=scaled), len(input)
        if self._measurer == threading.get_ident() and not self._choices.known(family, rows):
            self._measure(self._lt, family, rows, input.device)
            self._products = {}
        products = self._products
        if (family, rows) not in products:
            choice = self._choices.nearest(family, rows)
            product = None if choice is None else Product.of(self._lt, family, rows, choice)
            products[family, rows] = product if product is not None and product.is_possible else None
        return products[family, rows]

    def _measure(self, lt: CublasLt, family: Family, rows: int, device: torch.device) -> None:
        """Keeps the fastest, scales and the pass that applies them counted in; none where memory is too small."""

        def run(choice: Choice, weight: torch.Tensor) -> torch.Tensor:
            scales = (row_scale, scale) if choice.by_rows else (row_scale[:1], scale[:1])
            result = Product.of(lt, family, rows, choice)(input, weight, *scales)
            if family.scaled and not choice.by_rows:
                scaled(result, row_scale, scale, None)
            return result

        found: Choice | None = None
        with suppress(RuntimeError):
            input, weights = operands(family, rows, device)
            row_scale, scale = torch.ones(rows, device=device), torch.ones(family.features, device=device)
            choices = list(proposed(lt, family, rows))
            if others := list(tiled(lt, family, rows, Gpu.of(device))):
                expected = run(choices[0], weights[0])
                bound = ALIKE * expected.abs().amax()
                choices += [each for each in others if multiplies(partial(run, each, weights[0]), expected, bound)]
            found = fastest(choices, run, weights)
        self._choices.keep(family, rows, found)


def proposed(lt: CublasLt, family: Family, rows: int) -> Iterator[Choice]:
    """By cuBLAS."""
    for by_rows in (False, True) if family.scaled else (False,):
        shape = Shape(rows, family.features, family.depth, family.dtype, by_rows)
        algorithms = [*lt.algorithms(shape, MOST_WORKSPACE), *lt.algorithms(shape, 0)]
        yield from (Choice(algorithm, by_rows) for algorithm in dict.fromkeys(algorithms))


def tiled(lt: CublasLt, family: Family, rows: int, gpu: Gpu) -> Iterator[Choice]:
    """By tiles that fill the multiprocessors of a Hopper; on other GPUs they mean other kernels."""
    tiles = filling(rows, family.features, gpu.processors) if gpu.is_hopper else []
    shape = Shape(rows, family.features, family.depth, family.dtype)
    for algorithm in lt.algorithms(shape, 0)[:1] if tiles else ():
        for how in itertools.product(tiles, OPTIONS, CLUSTERS):
            found = lt.with_tile(shape, algorithm, *how)
            if found is not None and found.workspace <= MOST_WORKSPACE:
                yield Choice(found)


def multiplies(run: Callable[[], torch.Tensor], expected: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether a kernel that cuBLAS has not proposed gives what one gives that it has, up to rounding."""
    with suppress(RuntimeError):
        result = run()
        error = (result - expected).abs().amax()
        result.zero_()  # The next one's lies here: it is not to pass by writing nothing.
        return bool(error <= bound)
    return False


def operands(family: Family, rows: int, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random ones: zeros would cost the GPU less power. As many weights as keep each other out of the L2 cache, if not
    more than are read."""
    size = family.features * family.depth * family.dtype.itemsize
    count = min(FINAL_LAUNCHES, -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // size))
    shapes = [(rows, family.depth), *[(family.features, family.depth)] * count]
    input, *weights = (torch.randn(shape, dtype=torch.bfloat16, device=device).to(family.dtype) for shape in shapes)
    return input, weights


def fastest(
    choices: Sequence[Choice], run: Callable[[Choice, torch.Tensor], object], weights: Sequence[torch.Tensor]
) -> Choice | None:
    """All are timed by a few launches, the best of them by some more. None if there are none, or if the host is too
    slow to time any."""
    delay = DELAY

    def milliseconds(choice: Choice, launches: int) -> float:
        nonlocal delay
        times_late = 0
        while delay <= LONGEST_DELAY:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            run(choice, weights[0])
            torch.cuda._sleep(delay)
            begin.record()
            for place in range(launches):
                run(choice, weights[place % len(weights)])
            end.record()
            was_late = begin.query()
            end.synchronize()
            if not was_late:
                return begin.elapsed_time(end)
            times_late += 1
            if times_late % 2 == 0:  # once says nothing of the next time
                delay *= 4
        return math.inf

    def ranked(timed: Sequence[Choice], launches: int, turns: int) -> list[Choice]:
        least = dict.fromkeys(timed, math.inf)
        for choice in [*timed] * turns:
            least[choice] = min(least[choice], milliseconds(choice, launches))
        return sorted((each for each in least if least[each] < math.inf), key=least.__getitem__)

    finalists = ranked(choices, LAUNCHES, 1)[:FINALISTS]
    return next(iter(ranked(finalists, FINAL_LAUNCHES, TURNS) or finalists), None)
