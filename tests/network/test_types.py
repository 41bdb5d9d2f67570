"""Every shape rule against torch's own shape propagation (FakeTensor) on seeded random arguments, static and
symbolic.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from enginery import ops
from enginery.errors import NetworkError
from enginery.network import Dim, Network, Tensor, infer_types, resolve
from enginery.network import types as types_module
from enginery.network.faketensor import infer as infer_by_torch
from enginery.network.shapes import RULES
from enginery.network.verify import check_types

aten = torch.ops.aten
N = Dim.symbol("n")
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
    torch.float16,
]
FLOATS = [torch.float32, torch.bfloat16, torch.float64]


class Samples:
    """Random tensors and literals of one network."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.network = Network()
        self.symbolic = seed % 2 == 1

    def size(self) -> Any:
        return N if self.symbolic and self.random.random() < 0.4 else self.random.choice([1, 2, 3, 4, 6])

    def shape(self, low: int = 0, high: int = 4) -> tuple:
        return tuple(self.size() for _ in range(self.random.randint(low, high)))

    def tensor(self, shape: tuple | None = None, dtypes: list[torch.dtype] = DTYPES, low: int = 0) -> Tensor:
        shape = self.shape(low) if shape is None else shape
        return self.network.add_input("x", shape, self.random.choice(dtypes))

    def like(self, tensor: Tensor, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
        """Broadcasts with `tensor`: a suffix of its shape, some sizes 1."""
        shape = [size if self.random.random() < 0.7 else 1 for size in tensor.shape][self.random.randint(0, 2) :]
        return self.tensor(tuple(shape), dtypes)

    def number(self) -> Any:
        return self.random.choice([2, 1.5, True, -1, 0.0])

    def dim(self, tensor: Tensor) -> int:
        return self.random.randrange(-tensor.rank, tensor.rank) if tensor.rank else self.random.choice([0, -1])

    def boolean(self) -> bool:
        return self.random.random() < 0.5


Case = tuple[str, Callable[[Samples], tuple]]


def _unary(s: Samples) -> tuple:
    return (s.tensor(),)


def _float_unary(s: Samples) -> tuple:
    return (s.tensor(dtypes=FLOATS),)


def _binary(s: Samples) -> tuple:
    x = s.tensor()
    return (x, s.like(x))


def _with_number(s: Samples) -> tuple:
    return (s.tensor(), s.number())


def _reduce(s: Samples) -> tuple:
    x = s.tensor(dtypes=FLOATS, low=1)
    return (x, [s.dim(x)], s.boolean())


def _reduce_one(s: Samples) -> tuple:
    x = s.tensor(dtypes=FLOATS, low=1)
    return (x, s.dim(x), s.boolean())


def _with_dim(s: Samples) -> tuple:
    x = s.tensor(dtypes=FLOATS, low=1)
    return (x, s.dim(x))


def _matmul(s: Samples) -> tuple:
    k, batch, dtype = s.size(), s.shape(0, 2), [s.random.choice(FLOATS)]
    left = (*batch, s.size(), k) if s.boolean() else (k,)
    right = s.random.choice([(k, s.size()), (*batch, k, s.size()), (k,)])
    return (s.tensor(left, dtype), s.tensor(right, dtype))


def _linear(s: Samples) -> tuple:
    k, n, dtype = s.size(), s.random.choice([2, 5]), [s.random.choice(FLOATS)]
    bias = s.tensor((n,), dtype) if s.boolean() else None
    return (s.tensor((*s.shape(0, 3), k), dtype), s.tensor((n, k), dtype), bias)


def _slice(s: Samples) -> tuple:
    x = s.tensor((s.random.choice([4, 6, 9]), *s.shape(0, 2)))
    return (x, 0, s.random.choice([None, 1, 2, -2, 7]), s.random.choice([None, 3, -1, 100]), s.random.choice([1, 2]))


def _symbolic_slice(s: Samples) -> tuple:
    return (s.tensor((s.size(), N * 2, 3)), 1, s.random.choice([None, N]), s.random.choice([None, N * 2]), 1)


def _reshape(s: Samples) -> tuple:
    a, b = s.size(), s.size()
    return s.random.choice(
        [
            lambda: (s.tensor((a, b, 4)), [a, -1, 2]),
            lambda: (s.tensor((a, b, 4)), [-1]),
            lambda: (s.tensor((a, 4, b)), [a, 2, 2, b]),
            lambda: (s.tensor((a, 4, b)), [-1, b]),
        ]
    )()


def _cat(s: Samples) -> tuple:
    x = s.tensor(low=1)
    dim = s.dim(x)
    others = [s.tensor((*x.shape[: dim % x.rank], s.size(), *x.shape[dim % x.rank + 1 :])) for _ in range(2)]
    return ([x, *others], dim)


def _index(s: Samples) -> tuple:
    x = s.tensor((s.size(), s.size(), s.size()))
    index = s.shape(0, 2)
    indices: list[Any] = [s.tensor(index, [torch.int64]) if s.boolean() else None for _ in range(3)]
    indices[s.random.randrange(3)] = s.tensor(index, [torch.int64])
    while indices[-1] is None:
        indices.pop()
    return (x, indices)


def _expand(s: Samples) -> tuple:
    x = s.tensor((1, s.size()))
    return (x, [s.size(), s.size(), -1])


def _dim_choice(s: Samples) -> tuple:
    x = s.tensor(low=1)
    return (x, s.dim(x), s.dim(x))


CASES: list[Case] = [
    *[
        (name, _unary)
        for name in [
            "abs",
            "neg",
            "bitwise_not",
            "exp",
            "rsqrt",
            "sigmoid",
            "cos",
            "square",
            "sign",
            "isnan",
            "logical_not",
            "clone",
            "relu",
            "alias",
            "reciprocal",
            "erf",
            "sum",
            "any",
            "all",
            "numpy_T",
            "zeros_like",
            "ones_like",
            "empty_like",
            "max",
            "squeeze",
            "argmax",
            "floor",
            "log",
            "tanh",
        ]
    ],
    *[
        (name, _float_unary)
        for name in ["silu", "gelu", "mean", "softplus", "leaky_relu", "var", "std", "hardswish", "mish"]
    ],
    *[
        (name, _binary)
        for name in [
            "add",
            "sub",
            "mul",
            "div",
            "maximum",
            "eq",
            "lt",
            "pow",
            "remainder",
            "bitwise_and",
            "logical_and",
            "floor_divide",
            "fmod",
            "bitwise_or",
            "ge",
        ]
    ],
    *[
        (name, _with_number)
        for name in [
            "add",
            "sub",
            "mul",
            "div",
            "eq",
            "gt",
            "pow",
            "remainder",
            "bitwise_and",
            "floor_divide",
            "clamp_min",
            "full_like",
            "rsub",
            "fmod",
        ]
    ],
    ("pow", lambda s: (s.number(), s.tensor())),
    ("div", lambda s: (*_binary(s), {"rounding_mode": s.random.choice(["floor", "trunc"])})),
    ("clamp", lambda s: (s.tensor(), s.number(), s.number())),
    ("where", lambda s: (lambda x: (s.like(x, [torch.bool]), x, s.like(x)))(s.tensor())),
    ("where", lambda s: (lambda x: (s.like(x, [torch.bool]), x, s.number()))(s.tensor())),
    ("where", lambda s: (s.tensor(dtypes=[torch.bool]), s.number(), s.number())),
    ("masked_fill", lambda s: (lambda x: (x, s.like(x, [torch.bool]), 0))(s.tensor())),
    *[(name, _reduce) for name in ["sum", "mean", "amax", "amin", "logsumexp", "var", "std"]],
    *[(name, _reduce_one) for name in ["max", "min", "argmax", "any", "all", "prod"]],
    ("sum", lambda s: (s.tensor(low=1), [0])),
    ("linalg_vector_norm", lambda s: (s.tensor(dtypes=FLOATS, low=1), 2, [-1], True)),
    *[(name, _with_dim) for name in ["softmax", "log_softmax", "cumsum", "sort", "argsort"]],
    ("softmax", lambda s: (*_with_dim(s), torch.float32)),
    ("_softmax", lambda s: (*_with_dim(s), False)),
    ("cumsum", lambda s: (s.tensor(low=1), 0)),
    ("topk", lambda s: (s.tensor((s.size(), 6), FLOATS), 2)),
    ("matmul", _matmul),
    ("linear", _linear),
    (
        "mm",
        lambda s: (lambda k: (s.tensor((s.size(), k), [torch.float32]), s.tensor((k, 3), [torch.float32])))(s.size()),
    ),
    (
        "bmm",
        lambda s: (lambda b, k: (s.tensor((b, 2, k), FLOATS[:1]), s.tensor((b, k, 3), FLOATS[:1])))(s.size(), s.size()),
    ),
    (
        "addmm",
        lambda s: (
            lambda k: (s.tensor((3,), FLOATS[:1]), s.tensor((s.size(), k), FLOATS[:1]), s.tensor((k, 3), FLOATS[:1]))
        )(s.size()),
    ),
    ("outer", lambda s: (s.tensor((s.size(),)), s.tensor((s.size(),)))),
    (
        "einsum",
        lambda s: (lambda k: ("abk,ck->abc", [s.tensor((2, s.size(), k), FLOATS[:1]), s.tensor((3, k), FLOATS[:1])]))(
            s.size()
        ),
    ),
    (
        "scaled_dot_product_attention",
        lambda s: (
            lambda q, k: (
                s.tensor((1, 4, q, 8), FLOATS[:1]),
                s.tensor((1, 4, k, 8), FLOATS[:1]),
                s.tensor((1, 4, k, 6), FLOATS[:1]),
            )
        )(s.size(), s.size()),
    ),
    ("view", _reshape),
    ("reshape", _reshape),
    ("transpose", _dim_choice),
    ("permute", lambda s: (s.tensor((s.size(), s.size(), s.size())), s.random.choice([[2, 0, 1], [0, -1, 1]]))),
    ("t", lambda s: (s.tensor(s.shape(0, 2)),)),
    ("mT", lambda s: (s.tensor((s.size(), s.size(), 3)),)),
    ("unsqueeze", lambda s: (lambda x: (x, s.random.randint(-x.rank - 1, x.rank)))(s.tensor())),
    ("squeeze", lambda s: (lambda x: (x, s.dim(x)))(s.tensor(low=1))),
    ("squeeze", lambda s: (lambda x: (x, [0, -1]))(s.tensor((1, s.size(), 1)))),
    ("expand", _expand),
    ("repeat", lambda s: (s.tensor((s.size(), s.size())), [2, 1, 3])),
    ("repeat_interleave", lambda s: (s.tensor((s.size(), s.size())), 3, -1)),
    ("select", lambda s: (s.tensor((3, *s.shape(0, 2))), 0, s.random.choice([0, 2, -1]))),
    ("slice", _slice),
    ("slice", _symbolic_slice),
    ("narrow", lambda s: (s.tensor((6, s.size())), 0, 1, 3)),
    ("split", lambda s: (s.tensor((7, s.size())), s.random.choice([2, 3, 7, 9]), 0)),
    ("split_with_sizes", lambda s: (s.tensor((s.size(), 7)), [2, 4, 1], -1)),
    ("chunk", lambda s: (s.tensor((7, s.size())), s.random.choice([1, 2, 3, 5]), 0)),
    ("unbind", lambda s: (s.tensor((3, s.size())), 0)),
    ("cat", _cat),
    ("stack", lambda s: (lambda x: ([x, s.tensor(x.shape)], s.random.randint(-x.rank - 1, x.rank)))(s.tensor())),
    (
        "flatten",
        lambda s: (s.tensor((s.size(), s.size(), s.size())), *s.random.choice([(0, -1), (1, 2), (0, 1), (-2, -1)])),
    ),
    ("unflatten", lambda s: (s.tensor((s.size(), 6)), -1, s.random.choice([[2, 3], [-1, 2], [2, -1]]))),
    ("movedim", lambda s: (s.tensor((2, s.size(), 4)), *s.random.choice([(0, -1), (2, 0), (1, 1)]))),
    ("flip", lambda s: (s.tensor(low=1), [0])),
    ("tril", lambda s: (s.tensor((s.size(), s.size())),)),
    ("constant_pad_nd", lambda s: (s.tensor((s.size(), s.size())), [1, 2, 0, 3], 0.0)),
    ("embedding", lambda s: (s.tensor((7, s.size()), FLOATS), s.tensor(dtypes=[torch.int64]))),
    ("index_select", lambda s: (s.tensor((s.size(), 4)), 0, s.tensor((s.size(),), [torch.int64]))),
    ("gather", lambda s: (lambda i: (s.tensor((9, 9)), 1, s.tensor(i, [torch.int64])))((3, 4))),
    ("index", _index),
    ("one_hot", lambda s: (s.tensor(dtypes=[torch.int64]), 5)),
    (
        "index_put",
        lambda s: (s.tensor((4, 3), FLOATS[:1]), [s.tensor((2,), [torch.int64])], s.tensor((2, 3), FLOATS[:1])),
    ),
    ("slice_scatter", lambda s: (s.tensor((6, 3), FLOATS[:1]), s.tensor((2, 3), FLOATS[:1]), 0, 1, 3)),
    ("to", lambda s: (s.tensor(), s.random.choice(DTYPES))),
    ("type_as", lambda s: (s.tensor(), s.tensor())),
    ("full", lambda s: (list(s.shape()), s.number())),
    ("zeros", lambda s: (list(s.shape()),)),
    ("new_zeros", lambda s: (s.tensor(), [2, s.size()])),
    ("new_full", lambda s: (s.tensor(), [2], 1)),
    ("arange", lambda s: (s.random.choice([5, 2.5, N, N + 1]),)),
    ("arange", lambda s: (1, s.random.choice([5, 7.5]), s.random.choice([1, 2]))),
    ("layer_norm", lambda s: (s.tensor((s.size(), s.size(), 4), FLOATS), [4])),
    ("native_layer_norm", lambda s: (s.tensor((s.size(), s.size(), 4), FLOATS[:1]), [4], None, None, 1e-5)),
    ("rms_norm", lambda s: (s.tensor((s.size(), 4), FLOATS), [4])),
    *[
        (name, _unary)
        for name in [
            "exp2",
            "expm1",
            "log2",
            "log10",
            "log1p",
            "sqrt",
            "sin",
            "tan",
            "sinh",
            "cosh",
            "asin",
            "acos",
            "atan",
            "erfc",
            "isinf",
            "isfinite",
            "ceil",
            "round",
            "trunc",
            "positive",
            "detach",
            "prod",
            "min",
            "argmin",
            "nan_to_num",
        ]
    ],
    *[
        (name, _float_unary)
        for name in [
            "relu6",
            "elu",
            "selu",
            "celu",
            "hardsigmoid",
            "hardtanh",
            "rand_like",
            "randn_like",
            "log_sigmoid",
            "logit",
        ]
    ],
    *[
        (name, _binary)
        for name in [
            "minimum",
            "bitwise_xor",
            "ne",
            "le",
            "gt",
            "logical_or",
            "logical_xor",
            "atan2",
            "fmax",
            "fmin",
            "max",
            "min",
        ]
    ],
    *[(name, _with_number) for name in ["ne", "lt", "le", "ge", "bitwise_or", "bitwise_xor", "clamp_max", "fill"]],
    ("cumprod", _with_dim),
    ("_log_softmax", lambda s: (*_with_dim(s), False)),
    ("clamp", lambda s: (lambda x: (x, s.like(x), s.like(x)))(s.tensor(dtypes=FLOATS))),
    ("argmin", _reduce_one),
    ("squeeze", _unary),
    ("view_as", lambda s: (lambda a: (s.tensor((a, 4)), s.tensor((a, 2, 2))))(s.size())),
    ("reshape_as", lambda s: (lambda a: (s.tensor((a, 4)), s.tensor((4, a))))(s.size())),
    ("expand_as", lambda s: (lambda a: (s.tensor((1, a)), s.tensor((5, a))))(s.size())),
    ("broadcast_to", _expand),
    ("tile", lambda s: (s.tensor((s.size(), s.size())), [2, 1, 3])),
    ("movedim", lambda s: (s.tensor((2, s.size(), 4)), [0, 1], [2, 0])),
    ("roll", lambda s: (s.tensor(low=1), [1], [0])),
    ("triu", lambda s: (s.tensor((s.size(), s.size())), 1)),
    ("copy", lambda s: (lambda x: (x, s.like(x)))(s.tensor())),
    ("take_along_dim", lambda s: (s.tensor((4, 5)), s.tensor((4, 1), [torch.int64]), 1)),
    ("scatter", lambda s: (s.tensor((4, 5)), 1, s.tensor((4, 2), [torch.int64]), 1)),
    (
        "scatter_add",
        lambda s: (s.tensor((4, 5), FLOATS[:1]), 1, s.tensor((4, 2), [torch.int64]), s.tensor((4, 2), FLOATS[:1])),
    ),
    (
        "index_add",
        lambda s: (s.tensor((4, 5), FLOATS[:1]), 0, s.tensor((2,), [torch.int64]), s.tensor((2, 5), FLOATS[:1])),
    ),
    (
        "select_scatter",
        lambda s: (lambda a: (s.tensor((4, a), FLOATS[:1]), s.tensor((a,), FLOATS[:1]), 0, 1))(s.size()),
    ),
    ("ones", lambda s: (list(s.shape()), {"dtype": torch.int32})),
    ("new_ones", lambda s: (s.tensor(), [2, s.size()])),
    ("scalar_tensor", lambda s: (s.random.choice([1.5, 2.0]),)),
    ("linspace", lambda s: (0.0, 1.0, s.random.choice([5, 9]))),
    (
        "baddbmm",
        lambda s: (s.tensor((2, 3, 5), FLOATS[:1]), s.tensor((2, 3, 4), FLOATS[:1]), s.tensor((2, 4, 5), FLOATS[:1])),
    ),
    ("dot", lambda s: (s.tensor((4,), FLOATS[:1]), s.tensor((4,), FLOATS[:1]))),
    ("mv", lambda s: (s.tensor((s.size(), 4), FLOATS[:1]), s.tensor((4,), FLOATS[:1]))),
    ("lerp", lambda s: (lambda x: (x, s.like(x, [x.dtype]), s.like(x, [x.dtype])))(s.tensor(dtypes=FLOATS))),
]


def sample(case: Case, seed: int) -> tuple[Any, tuple]:
    name, make = case
    samples = Samples(seed)
    values = make(samples)
    kwargs = values[-1] if isinstance(values[-1], dict) else {}
    return resolve(getattr(aten, name), values[: len(values) - bool(kwargs)], kwargs)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_rule_agrees_with_torch(number: int) -> None:
    compared = 0
    for seed in range(8):
        op, args = sample(CASES[number], seed * 1000 + number)
        key = tuple(map(types_module._key, args))
        try:
            expected = infer_by_torch(op, key)
        except NetworkError:  # what torch refuses (bools negated, one value of a size only), a rule may let pass
            continue
        assert op in RULES, op
        inferred = infer_types(op, args)
        check_types(inferred, expected, {"n": (2, 64)})
        assert [dtype for _, dtype in inferred] == [dtype for _, dtype in expected]
        compared += 1
    assert compared >= 1


def test_every_rule_is_reached() -> None:
    """Rules that no case reaches are told apart by name, so that a new rule comes with a case."""
    reached = {sample(case, seed * 1000 + number)[0] for number, case in enumerate(CASES) for seed in range(8)}
    share = len(reached & RULES.keys()) / len(RULES)
    assert share > 0.7, sorted(str(op) for op in RULES.keys() - reached)


def test_own_operators_by_their_declared_shape() -> None:
    network = Network()
    query = network.add_input("q", (N, 4, 8), torch.bfloat16)
    key = network.add_input("k", (N, 2, 8), torch.bfloat16)
    value = network.add_input("v", (N, 2, 6), torch.bfloat16)
    assert ops.attention(query, key, value, 0.5).shape == (N, 4, 6)
    weight = network.add_constant("w", (100, 64), torch.bfloat16)
    packed = ops.pack_linear(weight)
    assert packed.shape == (-(-100 // ops.PANEL), 32, ops.PANEL, 2)
    assert ops.packed_linear(network.add_input("x", (N, 64), torch.bfloat16), packed, 100).shape == (N, 100)


def test_an_operator_without_a_rule_falls_back_to_torch() -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    assert aten.diff.default not in RULES
    assert torch.diff(x).shape == (N, 7)
    image = network.add_input("image", (N, 3, 8, 8), torch.float32)
    weight = network.add_constant("w", (4, 3, 3, 3), torch.float32)
    assert torch.nn.functional.conv2d(image, weight, padding=1).shape == (N, 4, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: torch.nonzero(x), "nonzero"),
        (lambda x, i: x[x > 0], "depends on data"),
        (lambda x, i: torch.nn.functional.linear(x, i), "linear"),
        (lambda x, i: x.view(3), "view"),
        (lambda x, i: x + x.new_zeros(5, 5), "do not broadcast"),
        (lambda x, i: x.transpose(0, 7), "out of range"),
        (lambda x, i: torch.cat([x, i]), "ranks"),
        (lambda x, i: torch.unique(x), "unique"),
        (lambda x, i: x.split(3, dim=0), "number of parts"),
    ],
)
def test_calls_that_do_not_fit_name_the_operator(call: Callable, message: str) -> None:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    i = network.add_input("i", (N,), torch.int64)
    before = len(network)
    with pytest.raises(NetworkError, match=message):
        call(x, i)
    assert len(network) <= before + 1
