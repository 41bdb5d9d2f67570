"""Packed and expert linears of the CPU against float64; a row has the same bits in any batch and on any threads."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.cpu import DTYPES, TOLERANCE, relative_error, require_kernels

from enginery import ops
from enginery.ops import PANEL, reference

SHAPES = [(1, 1), (16, 16), (PANEL + 1, 5), (100, 257), (48, 1000), (640, 512), (33, 2817)]
"""Outputs × depth: whole panels, ragged ones, odd depths, more than one chunk of depth."""


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_kernels()


@pytest.fixture
def random() -> torch.Generator:
    seed = torch.seed() % 2**31
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def normal(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=random).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("features", "depth"), SHAPES)
def test_packing_equals_its_reference(random: torch.Generator, features: int, depth: int, dtype: torch.dtype) -> None:
    weight = normal(random, features, depth, dtype=dtype)
    packed = ops.pack_linear(weight)
    assert torch.equal(packed, reference(ops.pack_linear)(weight))
    assert torch.equal(ops.pack_linear(weight.T.contiguous().T), packed)
    indices = torch.randint(0, features, (3, 7), generator=random)
    assert torch.equal(ops.packed_embedding(indices, packed, depth), weight[indices])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("features", "depth"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_against_float64(
    random: torch.Generator, features: int, depth: int, dtype: torch.dtype, with_bias: bool
) -> None:
    weight = normal(random, features, depth, dtype=dtype)
    bias = normal(random, features, dtype=dtype) if with_bias else None
    input = normal(random, 3, 29, depth, dtype=dtype)
    output = ops.packed_linear(input, ops.pack_linear(weight), features, bias)
    expected = torch.nn.functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
    assert output.dtype == dtype
    assert output.shape == (3, 29, features)
    assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), [(100, 257), (640, 512), (33, 2817)])
def test_a_row_has_the_same_bits_in_any_batch(
    random: torch.Generator, features: int, depth: int, dtype: torch.dtype
) -> None:
    packed = ops.pack_linear(normal(random, features, depth, dtype=dtype))
    input = normal(random, 200, depth, dtype=dtype)
    whole = ops.packed_linear(input, packed, features)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1, 5, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 6, 7, 13, 14, 15, 16, 29, 64, 111):
                first = int(torch.randint(0, 200 - rows + 1, (), generator=random))
                assert torch.equal(
                    ops.packed_linear(input[first : first + rows], packed, features), whole[first : first + rows]
                )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_empty_inputs(random: torch.Generator, dtype: torch.dtype) -> None:
    packed = ops.pack_linear(normal(random, 40, 24, dtype=dtype))
    wide = normal(random, 9, 48, dtype=dtype)
    assert torch.equal(
        ops.packed_linear(wide[:, ::2], packed, 40), ops.packed_linear(wide[:, ::2].contiguous(), packed, 40)
    )
    assert torch.equal(ops.packed_linear(wide[0, :24], packed, 40), ops.packed_linear(wide[:1, :24], packed, 40)[0])
    assert ops.packed_linear(wide[:0, :24], packed, 40).shape == (0, 40)
    assert ops.packed_embedding(torch.empty(0, 2, dtype=torch.int64), packed, 24).shape == (0, 2, 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_multiplied_but_the_row_itself(random: torch.Generator, dtype: torch.dtype) -> None:
    packed = ops.pack_linear(normal(random, 40, 301, dtype=dtype))
    input = normal(random, 20, 301, dtype=dtype)
    clean = ops.packed_linear(input, packed, 40)
    input[7] = torch.nan
    input[11] = torch.inf
    poisoned = ops.packed_linear(input, packed, 40)
    others = [row for row in range(20) if row not in (7, 11)]
    assert torch.equal(poisoned[others], clean[others])
    assert poisoned[7].isnan().all()


def test_extreme_values_are_rounded_like_torch_does(random: torch.Generator) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.cat([2.0 ** torch.arange(-30.0, 18.0), torch.tensor([torch.inf, -torch.inf, 65519.0, 65520.0])])
        weight = (values * (1 + torch.rand(values.shape, generator=random) / 64)).to(dtype)[:, None]
        one = torch.full((1, 1), 1.0 + 1 / 128, dtype=dtype)
        output = ops.packed_linear(one, ops.pack_linear(weight), len(weight))
        expected = (weight.double().flatten() * one.double().item()).to(dtype)
        normal_range = expected.abs().double() >= torch.finfo(dtype).tiny
        assert torch.equal(output[0][normal_range], expected[normal_range])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("features", "depth"), [(16, 16), (33, 257), (80, 64)])
def test_experts_against_float64(
    random: torch.Generator, features: int, depth: int, dtype: torch.dtype, transposed: bool
) -> None:
    weight, bias = normal(random, 5, features, depth, dtype=dtype), normal(random, 5, features, dtype=dtype)
    input, experts = normal(random, 57, depth, dtype=dtype), torch.randint(0, 4, (57,), generator=random)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    output = ops.expert_linear(input, stored, experts, bias, transposed)
    expected = torch.einsum("sk,snk->sn", input.double(), weight[experts].double()) + bias[experts].double()
    assert relative_error(output, expected) < TOLERANCE[dtype]
    for rows in (slice(0, 1), slice(20, 33)):
        assert torch.equal(ops.expert_linear(input[rows], stored, experts[rows], bias, transposed), output[rows])
    assert ops.expert_linear(input[:0], stored, experts[:0], None, transposed).shape == (0, features)


def test_wrong_arguments_are_refused_in_one_line(random: torch.Generator) -> None:
    weight = normal(random, 40, 24)
    packed, input = ops.pack_linear(weight), normal(random, 2, 24)
    experts = torch.zeros(2, dtype=torch.int64)
    refused = [
        (lambda: ops.packed_linear(input.half(), packed, 40), "another dtype"),
        (lambda: ops.packed_linear(input.long(), packed.long(), 40), "float32"),
        (lambda: ops.packed_linear(input[:, :23], packed, 40), "depth"),
        (lambda: ops.packed_linear(input, packed, 65), "panels"),
        (lambda: ops.packed_linear(input, packed, -1), "panels"),
        (lambda: ops.packed_linear(input, packed, 40, normal(random, 39)), "bias"),
        (lambda: ops.packed_linear(input, weight, 40), "dimensions"),
        (lambda: ops.packed_linear(input, packed.transpose(0, 1), 40), "packed weight"),
        (lambda: ops.packed_embedding(torch.tensor([64]), packed, 24), "index 64 is outside"),
        (lambda: ops.packed_embedding(torch.tensor([-1]), packed, 24), "index -1 is outside"),
        (lambda: ops.packed_embedding(torch.tensor([1.0]), packed, 24), "int64"),
        (lambda: ops.expert_linear(input, weight[None], experts + 1), "expert 1 is outside"),
        (lambda: ops.expert_linear(input, weight[None], experts[:1]), "1 experts for 2 rows"),
        (lambda: ops.expert_linear(input, weight[None, :, :20], experts), "depth"),
    ]
    for call, message in refused:
        with pytest.raises(RuntimeError, match=message):
            call()
