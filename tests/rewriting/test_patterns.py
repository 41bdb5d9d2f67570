"""What a pattern matches and what it binds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import EngineryError, UsageError
from enginery.network import Network
from enginery.rewriting import AnyOp, Call, Chain, Const, OneOf, Optional, Scalar, Through, Var, Vars
from rewriting.building import network_of

aten = torch.ops.aten


def last(function, **options):
    return network_of(function, **options).layers[-1]


def names(captures):
    return None if captures is None else {key: getattr(value, "name", value) for key, value in captures.items()}


@pytest.mark.parametrize(
    "build",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: aten.linear(x, w),
        lambda x, w: aten.linear.default(x, w),
        lambda x, w: aten.linear.default(x, w, None),
        lambda x, w: Call(F.linear, x, w, None),
    ],
)
def test_every_spelling_of_a_call_is_the_same_pattern(build):
    layer = last(lambda x, w: F.linear(x, w))
    assert names(build(Var("x"), Const("w")).match(layer)) == {"x": "x", "w": "w"}


@pytest.mark.parametrize(
    "spelling", [lambda x: torch.softmax(x, -1), lambda x: x.softmax(dim=-1), lambda x: F.softmax(x, dim=-1)]
)
def test_softmax_by_position_by_keyword_and_as_a_method(spelling):
    layer = last(spelling)
    for pattern in (torch.softmax(Var("x"), -1), torch.softmax(Var("x"), dim=-1), Var("x").softmax(-1)):
        assert pattern.match(layer) is not None
    assert torch.softmax(Var("x"), 0).match(layer) is None


def test_the_same_name_twice_is_the_same_value():
    pattern = F.silu(Var("x")) * Var("x")
    assert names(pattern.match(last(lambda x: F.silu(x) * x))) == {"x": "x"}
    assert pattern.match(last(lambda x, y: F.silu(x) * y)) is None


def test_the_same_node_twice_is_the_same_layer():
    inner = F.silu(Var("x"))
    pattern = inner * torch.sigmoid(inner)

    def shared(x):
        s = F.silu(x)
        return s * torch.sigmoid(s)

    assert pattern.match(last(shared)) is not None
    assert pattern.match(last(lambda x: F.silu(x) * torch.sigmoid(F.silu(x)))) is None


def test_a_constant_is_computed_from_constants_alone():
    pattern = F.linear(Var("x"), Const("w"))
    assert pattern.match(last(lambda x, w, v: F.linear(x, torch.cat([w, v])))) is not None
    assert pattern.match(last(lambda x: F.linear(x, x.transpose(0, 1) @ x))) is None


def test_dots_leave_the_rest_open():
    layer = last(lambda x, w, b: F.linear(x, w, b))
    assert names(aten.linear(Var("x"), ...).match(layer)) == {"x": "x"}
    assert names(Call(F.linear, Var("x"), ...).match(layer)) == {"x": "x"}
    assert F.linear(Var("x"), Var("w")).match(layer) is None


def test_an_unknown_argument_is_named():
    with pytest.raises(EngineryError, match="colour"):
        aten.linear(Var("x"), ..., colour=1)


def test_lists_and_variadic_captures():
    layer = last(lambda x, y, z: torch.cat([x, y, z], dim=-1))
    assert names(torch.cat([Var("a"), Var("b"), Var("c")], dim=-1).match(layer)) == {"a": "x", "b": "y", "c": "z"}
    assert torch.cat([Var("a"), Var("b")], dim=-1).match(layer) is None
    assert [value.name for value in torch.cat(Vars("parts"), dim=-1).match(layer)["parts"]] == ["x", "y", "z"]
    found = torch.cat([Var("a"), Vars("middle"), Var("c")], dim=-1).match(layer)
    assert [value.name for value in found["middle"]] == ["y"]
    assert found["c"].name == "z"


def test_an_optional_operand_is_none_when_absent():
    pattern = Call(F.linear, Var("x"), Const("w"), Optional(Const("b")))
    assert names(pattern.match(last(lambda x, w, b: F.linear(x, w, b)))) == {"x": "x", "w": "w", "b": "b"}
    assert names(pattern.match(last(lambda x, w: F.linear(x, w)))) == {"x": "x", "w": "w", "b": None}


def test_one_of_binds_the_first_that_matches_and_clears_the_others():
    pattern = OneOf(F.silu(Var("a")), F.gelu(Var("b"), approximate="tanh"), F.relu(Var("a")))
    assert names(pattern.match(last(lambda x: F.relu(x)))) == {"a": "x", "b": None}
    assert names(pattern.match(last(lambda x: F.gelu(x, approximate="tanh")))) == {"a": None, "b": "x"}
    assert pattern.match(last(lambda x: F.gelu(x))) is None


def test_a_name_that_only_some_alternatives_bind_is_still_one_value():
    pattern = OneOf(F.silu(Var("x")), F.relu(Var("y"))) * torch.sigmoid(Var("x"))
    assert pattern.match(last(lambda x: F.silu(x) * torch.sigmoid(x))) is not None
    assert pattern.match(last(lambda x, z: F.silu(z) * torch.sigmoid(x))) is None
    assert names(pattern.match(last(lambda x, z: F.relu(z) * torch.sigmoid(x)))) == {"y": "z", "x": "x"}


def test_any_op():
    layer = last(lambda x: torch.exp(torch.tanh(x)))
    assert names(AnyOp(AnyOp(Var("x"))).match(layer)) == {"x": "x"}
    assert AnyOp(Var("x"), where=lambda layer: layer.name == "tanh").match(layer) is None
    assert AnyOp(Var("x"), ops=(aten.exp.default,)).match(layer) is not None
    assert AnyOp(Var("x"), Var("y")).match(layer) is None


@pytest.mark.parametrize("swap", [False, True])
def test_commutative_operands_match_in_either_order(swap):
    build = (lambda x, y: F.relu(x) + torch.exp(y)) if swap else (lambda x, y: torch.exp(y) + F.relu(x))
    assert names((F.relu(Var("a")) + torch.exp(Var("b"))).match(last(build))) == {"a": "x", "b": "y"}


def test_subtraction_does_not_commute():
    pattern = F.relu(Var("a")) - Var("b")
    assert pattern.match(last(lambda x, y: y - F.relu(x))) is None


def test_deep_commutative_patterns_need_no_exponential_number_of_rules():
    def build(x):
        for _ in range(12):
            x = torch.tanh(x) + torch.exp(x)
        return x

    pattern = Var("x")
    for _ in range(12):
        pattern = torch.exp(pattern) + torch.tanh(pattern)
    assert names(pattern.match(last(build))) == {"x": "x"}


def test_backtracking_reaches_the_last_way():
    pattern = (Var("x") + Var("y")) * F.relu(Var("y"))
    assert names(pattern.match(last(lambda a, d: (d + a) * F.relu(d)))) == {"x": "a", "y": "d"}


def test_chains_are_found_however_they_are_bracketed():
    pattern = Chain(torch.add, F.relu(Var("a")), Const("c"), rest="others")
    for build in (
        lambda x, y, c: (x + F.relu(y)) + c,
        lambda x, y, c: c + (F.relu(y) + x),
        lambda x, y, c: F.relu(y) + (x + c),
    ):
        found = pattern.match(last(build))
        assert found is not None
        assert (found["a"].name, found["c"].name, [v.name for v in found["others"]]) == ("y", "c", ["x"])
    assert Chain(torch.add, Var("a"), Var("b")).match(last(lambda x, y, c: x + y + c)) is None


def test_a_chain_stops_at_values_that_others_read():
    def build(x, y, c):
        s = x + y
        return s + c, torch.exp(s)

    layer = network_of(build).layer("add_1")
    assert len(Chain(torch.add, Const("c"), rest="others").match(layer)["others"]) == 1


def test_a_chain_needs_an_associative_operator():
    with pytest.raises(UsageError, match="not associative"):
        Chain(torch.sub, Var("a"), Var("b"))


def test_through_no_ops_views_and_casts():
    def build(x):
        return F.silu(x.view(-1, 8).to(torch.float32).reshape(-1, 2, 4).double())

    layer = last(build)
    assert F.silu(Through(Var("x"))).match(layer)["x"].name == "to_1"
    assert F.silu(Through(Var("x"), casts=True)).match(layer)["x"].name == "reshape"
    assert F.silu(Through(Var("x"), casts=True, views=True)).match(layer)["x"].name == "x"
    assert F.silu(Through(F.relu(Var("x")), casts=True, views=True)).match(layer) is None


def test_through_never_looks_through_a_transpose_or_a_growing_expand():
    square = Network()
    x = square.add_input("x", (8, 8), torch.float32)
    layer = F.silu(x.transpose(0, 1)).parent
    assert F.silu(Through(Var("x"), views=True)).match(layer)["x"].name == "transpose"
    layer = F.silu(square.add_input("y", (1, 8), torch.float32).expand(8, 8)).parent
    assert F.silu(Through(Var("x"), views=True)).match(layer)["x"].name == "expand"


def test_scalars_are_captures_with_predicates():
    layer = last(lambda x: torch.rms_norm(x, (8,), None, 1e-6))
    small = Call(torch.rms_norm, Var("x"), Scalar("n"), None, Scalar("eps", lambda eps: eps < 1e-3))
    assert small.match(layer)["eps"] == 1e-6
    assert small.match(layer)["n"] == (8,)
    assert Call(torch.rms_norm, Var("x"), Scalar("n"), None, Scalar("e", lambda eps: eps > 1)).match(layer) is None


def test_a_number_never_binds_to_a_variable_nor_a_tensor_to_a_scalar():
    assert (Var("x") * Var("y")).match(last(lambda x: x * 2.0)) is None
    assert (Var("x") * Scalar("s")).match(last(lambda x, y: x * y)) is None
    assert (Var("x") * Scalar("s")).match(last(lambda x: x * 2.0))["s"] == 2.0
    assert (Var("x") * 2).match(last(lambda x: x * 2.0)) is not None


def test_tests_of_a_variable():
    layer = last(lambda x: F.relu(x))
    assert F.relu(Var("x", dtype=torch.float16)).match(layer) is None
    assert F.relu(Var("x", dtype=(torch.float16, torch.float32))).match(layer) is not None
    assert F.relu(Var("x", rank=3)).match(layer) is None
    assert F.relu(Var("x", shape=(None, 8))).match(layer) is not None
    assert F.relu(Var("x", shape=(None, 4))).match(layer) is None
    assert F.relu(Var("x", where=lambda value: value.name == "y")).match(layer) is None


def test_single_use():
    pattern = F.relu(torch.exp(Var("x")).bind(users=1))

    def shared(x):
        e = torch.exp(x)
        return e, F.relu(e)

    assert pattern.match(last(shared)) is None
    assert pattern.match(last(lambda x: F.relu(torch.exp(x)))) is not None
    assert F.relu(Var("x", users=1)).match(last(lambda x: F.relu(x) + x).inputs[0].parent) is None


def test_outputs_of_a_call_are_indexed():
    layer = last(lambda x: torch.split(x, [4, 4], dim=-1)[1].relu())
    parts = torch.split(Var("x"), [4, 4], dim=-1)
    assert F.relu(parts[1]).match(layer) is not None
    assert F.relu(parts[0]).match(layer) is None


def test_patterns_refuse_what_only_values_can_do():
    for misuse in (lambda p: bool(p), lambda p: list(p), lambda p: p.shape, lambda p: p.bind("n", escape="hide")):
        with pytest.raises((UsageError, AttributeError)):
            misuse(F.relu(Var("x")))


def test_a_pattern_of_symbolic_shapes_matches_without_their_values():
    pattern = aten.view(Var("x"), Scalar("shape"))
    found = pattern.match(last(lambda x: x.view(x.shape[0], 2, 4)))
    assert str(found["shape"]) == "(tokens, 2, 4)"
