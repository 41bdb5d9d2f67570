"""The text form: golden text, round trips, and everything that may be wrong with a text."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from enginery import ops
from enginery.errors import NetworkError
from enginery.network import Dim, Network, Provenance

from .strategies import networks

N = Dim.symbol("tokens")

GOLDEN = """\
network 1
range tokens = 2..4096
input %ids: int64[tokens]
constant %embed.weight: float32[32, 8]
constant %"odd name": float32[8]
%embed.embedding: float32[tokens, 8] = aten.embedding(%embed.weight, %ids)
%norm.rms_norm: float32[tokens, 8] = aten.rms_norm(%embed.embedding, [8], weight=%"odd name", eps=1e-06)
%view: float32[tokens, 2, 4] = aten.view(%norm.rms_norm, [tokens, 2, 4]) @attn
%attn.attention: float32[tokens, 2, 4] = enginery.attention(%view, %view, %view, 0.5, window=16)
%topk: (float32[tokens, 2, 2], int64[tokens, 2, 2]) = aten.topk(%attn.attention, 2) @ <- TopRule(attn.sort, "a b")
%slice: int64[tokens - 1, 2, 2] = aten.slice.Tensor(%topk#1, start=1)
%reshape: int64[4*tokens - 4] = aten.reshape(%slice, [-1])
%masked_fill: float32[tokens, 2, 4] = aten.masked_fill.Scalar(%view, %mask, -inf)
output best = %topk#0
output "all of it" = %reshape
"""


def golden() -> Network:
    network = Network()
    network.ranges["tokens"] = (2, 4096)
    ids = network.add_input("ids", (N,), torch.int64)
    table = network.add_constant("embed.weight", (32, 8), torch.float32)
    scale = network.add_constant("odd name", (8,), torch.float32)
    with network.inserting_before(None, module_path="embed"):
        x = F.embedding(ids, table)
    with network.inserting_before(None, module_path="norm"):
        x = F.rms_norm(x, (8,), scale, 1e-6)
    network.call(torch.ops.aten.view.default, x, [N, 2, 4], name="view")
    layer = network.layer("view")
    layer.module_path = "attn"
    with network.inserting_before(None, module_path="attn"):
        x = ops.attention(layer.output, layer.output, layer.output, 0.5, window=16)
    with network.inserting_before(None, provenance=Provenance("TopRule", ("attn.sort", "a b"))):
        best, places = torch.topk(x, 2)
    rest = places[1:].reshape(-1)
    network.set_output("best", best)
    network.set_output("all of it", rest)
    return network


def test_golden_text() -> None:
    text = GOLDEN.replace("%masked_fill: float32[tokens, 2, 4] = aten.masked_fill.Scalar(%view, %mask, -inf)\n", "")
    text = text.replace(" @ <-", " <-")
    assert str(golden()) == text
    parsed = Network.parse(text)
    assert str(parsed) == text
    parsed.verify()
    assert parsed.layer("topk").provenance == Provenance("TopRule", ("attn.sort", "a b"))
    assert parsed.layer("view").module_path == "attn"
    assert parsed.layer("embedding").module_path == "embed"


def test_literals_round_trip_exactly() -> None:
    network = Network()
    x = network.add_input("x", (N, 4), torch.float32)
    for value in (
        0.1,
        1 / 3,
        1e-300,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        1e22,
        2,
        -7,
        True,
        2**62,
        -1e-05,
    ):
        network.call(torch.ops.aten.masked_fill.Scalar, x, x > 0, value)
    network.call(torch.ops.aten.gelu.default, x, approximate="tanh")
    network.call(torch.ops.aten.to.dtype, x, torch.float8_e4m3fn)
    network.call(torch.ops.aten.clone.default, x, memory_format=torch.contiguous_format)
    for size in (N * N * 3 - N + 1, (N + 3) // 4, N % 3, Dim.apply("max", N - 7, 1), ((N // 2) % 5) * N):
        network.call(torch.ops.aten.new_zeros.default, x, [size])
    network.set_output("y", x)
    again = Network.parse(str(network))
    assert str(again) == str(network)
    for left, right in zip(network, again, strict=True):
        assert [repr(value) for value in left.args] == [repr(value) for value in right.args]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks_round_trip(network: Network) -> None:
    text = str(network)
    again = Network.parse(text)
    assert str(again) == text
    again.verify()
    assert network.diff(again) == ""


HEAD = "network 1\ninput %x: float32[n, 8]\nconstant %w: float32[8, 8]\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "%y: float32[n, 8] = aten.lineer(%x, %w)\noutput o = %y\n",
            r"line 4 \(layer y\): unknown operator 'aten.lineer'",
        ),
        ('%y: float32[n, 8] = os.system("ls")\noutput o = %y\n', "unknown operator"),
        ("%y: float32[n, 8] = aten.add_.Tensor(%x, %x)\noutput o = %y\n", "unknown operator"),
        ('%y: uint8[8] = aten.from_file("/etc/passwd", size=8)\noutput o = %y\n', "unknown operator"),
        ("%y: float32[n, 9] = aten.linear(%x, %w)\noutput o = %y\n", r"line 4 \(layer y\): the type is stated as"),
        ("%y: bfloat16[n, 8] = aten.linear(%x, %w)\noutput o = %y\n", "the type is stated as"),
        ("%y: float32[m, 8] = aten.linear(%x, %w)\noutput o = %y\n", "the type is stated as"),
        ("%y: (float32[n, 8], float32[n, 8]) = aten.linear(%x, %w)\noutput o = %y#0\n", "the type is stated as"),
        (
            "%y: float32[n, 8] = aten.relu(%z)\n%z: float32[n, 8] = aten.relu(%y)\noutput o = %z\n",
            "before it is defined",
        ),
        ("%y: float32[n, 8] = aten.relu(%y)\noutput o = %y\n", "before it is defined"),
        ("%x: float32[n, 8] = aten.relu(%x)\noutput o = %x\n", "defined twice"),
        (
            "%y: float32[n, 8] = aten.relu(%x)\n%y: float32[n, 8] = aten.relu(%x)\noutput o = %y\n",
            "line 5.*defined twice",
        ),
        ("%y: float32[n, 8] = aten.relu(%x)\n", "no output"),
        ("%y: float32[n, 8] = aten.relu(%x)\noutput o = %y", "cut"),
        ("%y: float32[n, 8] = aten.rel", "cut"),
        ("%y: float32[n, 8] = aten.relu(%x\noutput o = %y\n", "cannot be read"),
        ("%y: float32[n, 8] = aten.relu(%x, %x)\noutput o = %y\n", "requires 1"),
        ("%y: float32[n, 8] = aten.relu(self=%x)\noutput o = %y\n", "requires 1"),
        ("%y: float32[n, 8] = aten.linear(%x, %w, bias=1, bias=2)\noutput o = %y\n", "given twice"),
        ("%y: float32[n, 8] = aten.linear(%x, %w, bios=%w)\noutput o = %y\n", "no optional argument 'bios'"),
        ("%y: float32[n, 8] = aten.softmax.int(%x, -1, dtype=3)\noutput o = %y\n", "'dtype' takes"),
        ('%y: float32[n, 8] = aten.softmax.int(%x, "a")\noutput o = %y\n', "'dim' takes"),
        ("%y: float32[n, 8] = aten.softmax.int(%x, [1])\noutput o = %y\n", "'dim' takes"),
        ("%y: float32[n, 8] = aten.cat([%x, 3])\noutput o = %y\n", "aten.cat"),
        ("%y: float32[n, 8] = aten.view(%x, [n, 8)\noutput o = %y\n", "line 4"),
        ("%y: float32[n // 0] = aten.relu(%x)\noutput o = %y\n", "line 4"),
        ("%y: floot32[n, 8] = aten.relu(%x)\noutput o = %y\n", "no dtype"),
        ("%y: float32[-8] = aten.relu(%x)\noutput o = %y\n", "no size"),
        ("wibble\noutput o = %x\n", "line 4: cannot be read"),
        ("output o = %x\noutput o = %x\n", "defined twice"),
        ("output o = %q\n", "before it is defined"),
        ("output o = %x\n%y: float32[n, 8] = aten.relu(%x)\n", "after the outputs"),
        ("range n = 9..3\noutput o = %x\n", "empty"),
        (f"%y: float32[n, 8] = aten.view(%x, {'[' * 40}n{']' * 40})\noutput o = %y\n", "nested"),
        (f"%y: float32[{'(' * 40}n] = aten.relu(%x)\noutput o = %y\n", "nested"),
        (f"%y: float32[{'9' * 30}] = aten.relu(%x)\noutput o = %y\n", "no size"),
        (f"%{'a' * (1 << 20)}: float32[8] = aten.relu(%x)\noutput o = %x\n", "characters"),
        ("%y: (float32[1, 8]) = aten.split.Tensor(%w, 1)\noutput o = %x\n", "line 4"),
    ],
)
def test_a_bad_text_is_one_error_with_its_line(body: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message) as caught:
        Network.parse(HEAD + body)
    assert "line" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_text_without_head_and_a_bomb_are_refused_before_work() -> None:
    with pytest.raises(NetworkError, match="line 1"):
        Network.parse("hello\n")
    with pytest.raises(NetworkError, match="line 1"):
        Network.parse("")
    with pytest.raises(NetworkError, match="lines, more than"):
        Network.parse("network 1\n" + "\n" * 10_000_000)
    huge = "network 1\ninput %x: float32[1000000000]\n"
    with pytest.raises(NetworkError, match="parts"):
        Network.parse(huge + "%y: (float32[1], float32[1]) = aten.split.Tensor(%x, 1)\noutput o = %x\n")
    with pytest.raises(NetworkError, match="parts"):
        Network.parse(huge + "%y: (float32[], float32[]) = aten.unbind.int(%x)\noutput o = %x\n")


def test_mutated_texts_never_raise_anything_else() -> None:
    text, rng = str(golden()), random.Random(7)
    for _ in range(600):
        place = rng.randrange(len(text))
        kind = rng.random()
        junk = rng.choice([*'[]()%,=@#"\\ \n*-/0xn.', "//", "min(", "1e999", "<-", "None", "\x00", "é"])
        changed = (
            text[:place] + junk + text[place + (kind < 0.5) :]
            if kind < 0.8
            else text[:place] + text[place + rng.randrange(30) :]
        )
        try:
            Network.parse(changed)
        except NetworkError:
            continue


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_junk_is_refused(junk: str) -> None:
    with pytest.raises(NetworkError):
        Network.parse("network 1\n" + junk)


def test_crafted_lines_take_linear_time() -> None:
    began = time.perf_counter()
    for line in ("%y: float32[8] = aten.relu(" + ") <- a(" * 100_000, "%y: " + "a[" * 200_000, '%"' + "\\" * 400_000):
        with pytest.raises(NetworkError):
            Network.parse(HEAD + line + "\noutput o = %x\n")
    assert time.perf_counter() - began < 60  # quadratic would be hours
