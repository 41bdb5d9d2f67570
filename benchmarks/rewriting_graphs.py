"""Graphs and rules that `benchmarks/rewriting.py` measures: a transformer-like network of 17 calls per layer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from enginery.network.dim import Dim
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.rewriting import Call, Const, PatternRewriter, Scalar, Var

LIBRARY = torch.library.Library("bench", "FRAGMENT")
TOKENS = Dim.symbol("tokens")
HIDDEN, WIDE, EPS = 32, 64, 1e-6
NODES_PER_LAYER, MATCHES_PER_LAYER = 17, 4


def _define(schema: str, shape) -> torch._ops.OpOverload:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, shape, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bench::{name}", shape, lib=LIBRARY)
    return getattr(torch.ops.bench, name).default


attention = _define("attention(Tensor q, Tensor k, Tensor v) -> Tensor", lambda q, k, v: torch.empty_like(q))
attention_with_bias = _define(
    "attention_with_bias(Tensor q, Tensor k, Tensor v, Tensor bq, Tensor bk, Tensor bv) -> Tensor",
    lambda q, k, v, bq, bk, bv: torch.empty_like(q),
)
silu_mul = _define("silu_mul(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate))
add_rms_norm = _define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
norm = _define("norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: torch.empty_like(x))
"""rms_norm for peers that would decompose it"""


class AttentionWithBias(PatternRewriter):
    """attention(q + bq, k + bk, v + bv)  ->  attention_with_bias(q, k, v, bq, bk, bv)"""

    pattern = attention(Var("q") + Const("bq"), Var("k") + Const("bk"), Var("v") + Const("bv"))

    def rewrite(self, network: Network, q: Tensor, k: Tensor, v: Tensor, bq: Tensor, bk: Tensor, bv: Tensor):
        return network.call(attention_with_bias, q, k, v, bq, bk, bv)


class SiluMul(PatternRewriter):
    """silu(gate) * up  ->  silu_mul(gate, up)"""

    pattern = F.silu(Var("gate")) * Var("up")

    def rewrite(self, network: Network, gate: Tensor, up: Tensor):
        return network.call(silu_mul, gate, up)


class AddNorm(PatternRewriter):
    """s = x + r; rms_norm(s)  ->  (n, s) = add_rms_norm(x, r)"""

    _sum = (Var("x") + Var("residual")).bind(escape="return")
    pattern = (Call(torch.rms_norm, _sum, Scalar("shape"), Const("weight"), Scalar("eps")), _sum)

    def rewrite(self, network: Network, x: Tensor, residual: Tensor, weight: Tensor, eps: float):
        return network.call(add_rms_norm, x, residual, weight, eps)


RULES = (AttentionWithBias, SiluMul, AddNorm)


class _Misses(PatternRewriter):
    def rewrite(self, network: Network):
        raise AssertionError("it must not match")


class AttentionMiss(_Misses):
    """A bias of rank 2, which there is not."""

    pattern = attention(Var("q") + Const("bq"), Var("k") + Const("bk"), Var("v") + Const("bv", rank=2))


class SiluMiss(_Misses):
    pattern = F.silu(Var("gate")) * Var("up", rank=3)


class NormMiss(_Misses):
    pattern = Call(torch.rms_norm, Var("x") + Var("residual"), Scalar("shape"), Const("weight", rank=2), ...)


MISSES = (AttentionMiss, SiluMiss, NormMiss)
"""at every place where a rule of RULES fits, one of these fits but for its last part"""


def transformer(layers: int) -> Network:
    """17 calls per layer, four of which a rule of RULES replaces together with their operands."""
    network = Network()
    call, f32 = network.call, torch.float32
    aten = torch.ops.aten
    x = network.add_input("x", (TOKENS, HIDDEN), f32)
    normed = network.add_input("normed", (TOKENS, HIDDEN), f32)
    constant = network.add_constant
    for i in range(layers):
        heads = []
        for name in "qkv":
            projected = call(aten.linear.default, normed, constant(f"layers.{i}.{name}.weight", (HIDDEN, HIDDEN), f32))
            heads.append(call(aten.add.Tensor, projected, constant(f"layers.{i}.{name}.bias", (HIDDEN,), f32)))
        mixed = call(
            aten.linear.default, call(attention, *heads), constant(f"layers.{i}.o.weight", (HIDDEN, HIDDEN), f32)
        )
        x = call(aten.add.Tensor, x, mixed)
        normed = call(aten.rms_norm.default, x, (HIDDEN,), constant(f"layers.{i}.norm1", (HIDDEN,), f32), EPS)
        gate = call(aten.linear.default, normed, constant(f"layers.{i}.gate.weight", (WIDE, HIDDEN), f32))
        up = call(aten.linear.default, normed, constant(f"layers.{i}.up.weight", (WIDE, HIDDEN), f32))
        wide = call(aten.mul.Tensor, call(aten.silu.default, gate), up)
        down = call(aten.linear.default, wide, constant(f"layers.{i}.down.weight", (HIDDEN, WIDE), f32))
        x = call(aten.add.Tensor, x, down)
        normed = call(aten.rms_norm.default, x, (HIDDEN,), constant(f"layers.{i}.norm2", (HIDDEN,), f32), EPS)
    network.set_output("x", x)
    network.set_output("normed", normed)
    return network


class SinkTranspose(PatternRewriter):
    """relu(transpose(x))  ->  transpose(relu(x))"""

    pattern = F.relu(torch.ops.aten.transpose.int(Var("x"), Scalar("a"), Scalar("b")))

    def rewrite(self, x: Tensor, a: int, b: int):
        return torch.transpose(F.relu(x), a, b)


class HoistTranspose(PatternRewriter):
    """transpose(relu(x))  ->  relu(transpose(x))"""

    pattern = torch.ops.aten.transpose.int(F.relu(Var("x")), Scalar("a"), Scalar("b"))

    def rewrite(self, x: Tensor, a: int, b: int):
        return F.relu(torch.transpose(x, a, b))


class MergeIntoUser(PatternRewriter):
    """x + 1 whose only user adds something else takes that addition over."""

    root_layer = (torch.ops.aten.add.Tensor,)

    def match_and_rewrite(self, layer):
        users = layer.output.users
        if len(users) != 1 or users[0].op is not layer.op or users[0].args[1] == 1 or layer.output.is_output:
            return None
        return {users[0]: layer.args[0] + (layer.args[1] + users[0].args[1])}


def _relus(x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        x = F.relu(x)
    return x


def _additions(x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        x = x + 1
    return x + 2


CASCADES = {
    "sink from the top": (SinkTranspose, lambda x, depth: _relus(torch.transpose(x, 0, 1), depth)),
    "hoist from the bottom": (HoistTranspose, lambda x, depth: torch.transpose(_relus(x, depth), 0, 1)),
    "merge backwards through users": (MergeIntoUser, _additions),
}


def cascade(name: str, depth: int) -> Network:
    network = Network()
    network.set_output("out", CASCADES[name][1](network.add_input("x", (TOKENS, HIDDEN), torch.float32), depth))
    return network


class MergePair(PatternRewriter):
    """linear(x, w), linear(x, v)  ->  split(linear(x, cat(w, v)))"""

    pattern = (F.linear(Var("x"), Const("w")), F.linear(Var("x"), Const("v")))

    def rewrite(self, x: Tensor, w: Tensor, v: Tensor):
        return torch.split(F.linear(x, torch.cat([w, v])), [w.shape[0], v.shape[0]], dim=-1)


def pairs_of_linears(layers: int) -> Network:
    network = Network()
    x = network.add_input("x", (TOKENS, HIDDEN), torch.float32)
    for i in range(layers):
        gate, up = (
            F.linear(x, network.add_constant(f"layers.{i}.{name}", (HIDDEN, HIDDEN), torch.float32))
            for name in ("gate", "up")
        )
        x = F.silu(gate) * up
    network.set_output("out", x)
    return network


def idle_rules(count: int) -> list[PatternRewriter]:
    """Rules that look for roots that the network has (every second one) or has not, and never match."""

    def rewrite(self):
        return None

    aten = torch.ops.aten
    roots = [lambda p: p * aten.cos(Var("y")), aten.sin, lambda p: aten.tan(Var("y")) + p, aten.erf]
    patterns = [roots[i % len(roots)](aten.atan(Var("x"))) for i in range(count)]
    return [type(f"Idle{i}", (PatternRewriter,), {"pattern": p, "rewrite": rewrite})() for i, p in enumerate(patterns)]
