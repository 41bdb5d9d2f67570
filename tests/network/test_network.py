"""Verification, copying, diff, drawings, Python form, kinds, the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional as F

from enginery import ops
from enginery.errors import NetworkError
from enginery.network import Dim, LayerKind, Network, Program, Tensor, find_operator
from enginery.network.kind import _ATEN, WITHOUT_EQUIVALENT

from .strategies import inputs_for, networks

N = Dim.symbol("n")


def small() -> Network:
    network = Network()
    x = network.add_input("x", (N, 8), torch.float32)
    w = network.add_constant("w", (8, 8), torch.float32)
    y = torch.relu(F.linear(x, w.T))
    network.set_output("y", y + y)
    return network


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks_are_sound_and_all_forms_compute_the_same(network: Network) -> None:
    network.verify()
    inputs, constants = inputs_for(network)
    expected = network.run(inputs, constants)
    scope: dict = {}
    exec(network.to_python(), scope)  # noqa: S102
    module = network.to_graph_module()
    pruned = network.copy()
    pruned.prune()
    pruned.verify()
    for results in (
        network.copy().run(inputs, constants),
        pruned.run(inputs, constants),
        scope["network"](*inputs, constants),
        module(*inputs, *(constants[tensor.name] for tensor in network.constants)),
    ):
        for left, right in zip(expected, results, strict=True):
            torch.testing.assert_close(left, right, equal_nan=True)
    for tensor, value in zip(network.outputs, expected, strict=True):
        assert tuple(s.substitute({"tokens": 5}) if isinstance(s, Dim) else s for s in tensor.shape) == tuple(
            value.shape
        )
        assert tensor.dtype == value.dtype


def test_a_tensor_is_neither_true_nor_false() -> None:
    y = small().outputs[0]
    with pytest.raises(NetworkError, match=r"neither true nor false: it has no value yet\. Choose by torch\.where"):
        bool(y)
    assert y in [y]


def _wrong_shape(network: Network) -> None:
    network.layer("relu").output.shape = (N, 9)


def _wrong_dtype(network: Network) -> None:
    network.layer("relu").output.dtype = torch.int64


def _lost_use(network: Network) -> None:
    network.layer("relu").output._uses.clear()


def _out_of_order(network: Network) -> None:
    network.move_before(network.layer("relu"), network.layer("linear"))


def _foreign(network: Network) -> None:
    other = Network()
    x = other.add_input("x", (N, 8), torch.float32)
    network.layer("relu")._set_args((x,))


def _bad_argument(network: Network) -> None:
    network.layer("add").set_argument("alpha", "two")


def _bad_output(network: Network) -> None:
    network._outputs["z"] = network.layer("relu").output


def _bad_constness(network: Network) -> None:
    network.layer("relu").output.is_constant = True


def _bad_name(network: Network) -> None:
    network.layer("relu").name = "linear"


def _write(network: Network) -> None:
    x = network.layer("relu").output
    network.add_layer(torch.ops.aten.add_.Tensor, (x, x, 1), types=[(x.shape, x.dtype)])


def _unknown_symbol(network: Network) -> None:
    network.call(torch.ops.aten.zeros.default, [Dim.symbol("k")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_wrong_shape, "layer relu: the type is stated as"),
        (_wrong_dtype, "layer relu: the type is stated as"),
        (_lost_use, "users of relu"),
        (_out_of_order, "layer relu reads linear before"),
        (_foreign, "layer relu reads x before"),
        (_bad_argument, "layer add"),
        (_bad_output, "recorded as output"),
        (_bad_constness, "layer relu is not known at build time"),
        (_bad_name, "known as relu"),
        (_write, "writes to relu"),
        (_unknown_symbol, "size k, which no input gives"),
    ],
)
def test_each_damage_is_found_by_name(damage: Callable[[Network], None], message: str) -> None:
    network = small()
    network.verify()
    damage(network)
    with pytest.raises(NetworkError, match=message):
        network.verify()


def test_constness_is_derived() -> None:
    network = small()
    assert network.layer("numpy_T").is_constant
    assert not network.layer("linear").is_constant


def test_prune_leaves_effects_and_outputs() -> None:
    network = small()
    (x,) = network.inputs
    torch.exp(torch.exp(x))
    network.call(torch.ops.aten.dropout.default, x, 0.5, True)
    assert network.prune() == 2
    assert [layer.name for layer in network] == ["numpy_T", "linear", "relu", "add", "dropout"]


def test_diff_shows_what_changed_and_not_its_readers() -> None:
    old = small()
    new = old.copy()
    relu = new.layer("relu")
    with new.inserting_before(relu):
        silu = F.silu(relu.inputs[0])
    relu.output.replace_all_uses_with(silu)
    new.erase(relu)
    assert old.diff(new).splitlines() == [
        "4 -> 4 layers, -1 +1",
        "+ %silu: float32[n, 8] = aten.silu(%linear)",
        "- %relu: float32[n, 8] = aten.relu(%linear)",
    ]
    new.layer("add").set_argument("alpha", 2)
    assert "+ %add: float32[n, 8] = aten.add.Tensor(%silu, %silu, alpha=2)" in old.diff(new)
    assert old.diff(old.copy()) == ""


def test_diff_tells_swapped_operands_and_outputs() -> None:
    def build(swap: bool) -> Network:
        network = Network()
        a, b = (network.add_input(name, (4,), torch.float32) for name in "ab")
        result = b - a if swap else a - b
        network.set_output("o", result)
        network.set_output("p", b if swap else a)
        return network

    text = build(False).diff(build(True))
    assert "- %sub: float32[4] = aten.sub.Tensor(%a, %b)" in text
    assert "+ %sub: float32[4] = aten.sub.Tensor(%b, %a)" in text
    assert "- output p = %a" in text
    assert "+ output p = %b" in text


def test_dot_names_layers_and_escapes() -> None:
    network = small()
    network.add_input('quote " in name', (4,), torch.float32)
    drawing = network.to_dot()
    assert '"layer relu" -> "layer add" [label="float32[n, 8]"]' in drawing
    assert r"quote \" in name" in drawing
    assert drawing.count("{") == drawing.count("}")


def test_every_kind_is_mapped_or_has_a_reason() -> None:
    assert len(LayerKind) == 47
    mapped = set(_ATEN) | {LayerKind.PLUGIN_V2}
    assert mapped.isdisjoint(WITHOUT_EQUIVALENT)
    assert mapped | WITHOUT_EQUIVALENT.keys() == set(LayerKind)
    for names in _ATEN.values():
        for name in names.split():
            assert hasattr(torch.ops.aten, name), name
    network = small()
    kinds = [layer.kind for layer in network]
    assert kinds == [LayerKind.SHUFFLE, LayerKind.FULLY_CONNECTED, LayerKind.ACTIVATION, LayerKind.ELEMENTWISE]


def test_our_operators_are_plugins() -> None:
    network = Network()
    q = network.add_input("q", (N, 2, 8), torch.float32)
    assert ops.attention(q, q, q, 1.0).parent.kind is LayerKind.PLUGIN_V2


def test_inputs_are_checked_before_a_run() -> None:
    network = Network()
    a = network.add_input("a", (N, 8), torch.float32)
    b = network.add_input("b", (N, 2 * N), torch.float32)
    w = network.add_constant("w", (8,), torch.float32)
    network.set_output("o", a * w + b[:, :1])
    fine = {"w": torch.ones(8)}
    assert network(torch.zeros(3, 8), torch.zeros(3, 6), **fine).shape == (3, 8)
    assert network(b=torch.zeros(3, 6), a=torch.zeros(3, 8), **fine).shape == (3, 8)
    cases = [
        ((torch.zeros(3, 8),), fine, "1 inputs given, the network has 2: a, b"),
        ((torch.zeros(3, 7), torch.zeros(3, 6)), fine, r"%a: float32\[n, 8\] got a value of shape \[3, 7\]"),
        ((torch.zeros(3, 8), torch.zeros(4, 6)), fine, "but n is 3"),
        ((torch.zeros(3, 8), torch.zeros(3, 7)), fine, r"7 in dimension 1 where 2\*n is 6"),
        ((torch.zeros(3, 8).int(), torch.zeros(3, 6)), fine, "dtype int32"),
        ((torch.zeros(8), torch.zeros(3, 6)), fine, "got a value of shape"),
        ((torch.zeros(3, 8), torch.zeros(3, 6)), {}, "constant w has no value"),
    ]
    for inputs, constants, message in cases:
        with pytest.raises(NetworkError, match=message):
            network.run(inputs, constants)


def test_a_layer_that_fails_is_named() -> None:
    network = Network()
    x = network.add_input("x", (4, 4), torch.float32)
    i = network.add_input("i", (2,), torch.int64)
    network.set_output("o", x[i])
    with pytest.raises(NetworkError, match=r"layer index \(aten.index.Tensor\) failed"):
        network(torch.zeros(4, 4), torch.tensor([0, 9]))


def test_a_program_runs_a_part_and_frees_what_nobody_reads() -> None:
    network = Network()
    x = network.add_input("x", (4,), torch.float32)
    y = x
    for _ in range(5):
        y = y + 1
    layers = network.layers
    program = Program(layers[1:], [layers[0].output], [y])
    assert program([torch.zeros(4)])[0].tolist() == [4.0] * 4
    assert all(len(step.dead) == 1 for step in program._steps[1:])
    with pytest.raises(NetworkError, match="before it is computed"):
        Program(layers[1:], [x], [y])


def test_effects_keep_their_order_in_a_run() -> None:
    network = Network()
    T, cache = 3, (4, 1, 16, 8)
    q = network.add_input("q", (T, 1, 8), torch.float32)
    pools = [network.add_input(name, cache, torch.float32) for name in ("k_cache", "v_cache")]
    slots = network.add_input("slots", (T,), torch.int64)
    tables = network.add_input("tables", (1, 1), torch.int32)
    start = network.add_input("start", (2,), torch.int32)
    lens = network.add_input("lens", (1,), torch.int32)
    out = ops.paged_attention(q, q, q, *pools, slots, tables, start, lens, 0.5)
    network.set_output("o", out)
    assert network.layer("paged_attention").has_effects
    network.verify()
    assert network.prune() == 0
    keys = torch.zeros(cache)
    tokens = torch.randn(T, 1, 8)
    network(tokens, keys, torch.zeros(cache), torch.arange(3), torch.zeros(1, 1).int(),
            torch.tensor([0, 3]).int(), torch.tensor([3]).int())  # fmt: skip
    torch.testing.assert_close(keys[0, 0, :3], tokens[:, 0])


@pytest.mark.parametrize(
    "name", ["aten.add_.Tensor", "aten.nope", "prim.print", "aten", "aten.add.Nope", "aten.from_file"]
)
def test_the_registry_is_closed(name: str) -> None:
    with pytest.raises(NetworkError, match="unknown operator"):
        find_operator(name)


def test_tensors_are_hashable_and_compare_by_identity() -> None:
    network = small()
    (x,) = network.inputs
    assert x == x
    assert isinstance(torch.eq(x, x), Tensor)
    assert {x: 1}[x] == 1
