"""Hypothesis strategies: small random decoders, spelled in the many ways in which models spell the same thing.

Every choice is one that some model of transformers makes, or a detour that leaves the value as it is. Each decoder is
`token_ids [tokens], positions [tokens] -> logits [tokens, vocabulary]`, as a frontend gives it, and has a meaning that
the pipeline supports: whatever it does not recognise here is a failure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from enginery import ops
from enginery.network import Dim, Network, Tensor

Pick = Callable[[Sequence[Any]], Any]

TOKENS = Dim.symbol("tokens")
LONGEST = 64
"""tokens of the mask tables"""
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)

aten = torch.ops.aten


class Writer:
    """Writes one decoder; `pick` chooses among alternatives. The methods are the parts of a decoder."""

    def __init__(self, pick: Pick, layers: Sequence[int] = (1, 1, 2)) -> None:
        self.pick = self.fresh = pick
        self.network = Network()
        self.path = ""
        self.layers = self.pick(layers)
        self.dtype = self.pick(DTYPES)
        self.batched = self.maybe()
        self.groups, self.heads = self.pick([(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 6)])
        self.head_dim = self.pick([4, 8])
        self.hidden = self.pick([8, 16, 24])
        self.positional = self.pick(["rotary", "rotary", "interleaved", "alibi", "learned", "none"])
        self.values: list[Tensor] = []
        """floating values that a test may make outputs of the network"""
        self.shares = self.maybe()
        self.shared: dict[str, Any] = {}
        """what is computed once for all layers, if `shares`: masks and angles"""

    def maybe(self) -> bool:
        return self.pick((False, True))

    def rarely(self) -> bool:
        return self.pick((False, False, False, False, False, True))

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """A value that is shared between layers, or made for each, as the decoder at hand has it."""
        if not self.shares:
            return make()
        if key not in self.shared:
            with self.module("model"):
                pick, self.pick = self.pick, self.fresh
                self.shared[key] = make()
                self.pick = pick
        return self.shared[key]

    # Leaves

    def weight(self, *shape: int) -> Tensor:
        return self.network.add_constant(f"{self.path}weight_{len(self.network.constants)}", shape, self.dtype)

    def table(self, value: torch.Tensor) -> Tensor:
        name = f"{self.path}table_{len(self.network.constants)}"
        return self.network.add_constant(name, tuple(value.shape), value.dtype, value)

    @contextmanager
    def module(self, path: str) -> Iterator[None]:
        """What is written now belongs to the module of that path."""
        outer, self.path = self.path, f"{path}."
        with self.network.inserting_before(None, module_path=path):
            yield
        self.path = outer

    def factor(self, value: float) -> Any:
        """The number, or a constant of rank 0 that holds it."""
        return value if self.maybe() else self.table(torch.tensor(value, dtype=self.dtype))

    def arange(self) -> Any:
        """The places of the tokens: counted, or as the positions that the network is given."""
        return self.network.call(aten.arange.default, TOKENS) if self.maybe() else self.positions

    # Detours

    def detour(self, x: Any) -> Any:
        """Now and then, x by a way that leaves it as it is."""
        self.values.append(x)
        if not self.rarely():
            return x
        last = x.shape[-1]
        ways = {
            "contiguous": lambda: x.contiguous(),
            "clone": lambda: x.clone(),
            "dropout": lambda: F.dropout(x, 0.1, training=False),
            "same dtype": lambda: x.to(x.dtype),
            "wider and back": lambda: x.to(torch.float64).to(x.dtype),
            "same view": lambda: x.view(x.shape),
            "unsqueezed": lambda: x.unsqueeze(0).squeeze(0),
            "flattened": lambda: x.reshape(-1, last).reshape(x.shape),
            "transposed": lambda: x.transpose(-1, -2).transpose(-2, -1),
            "turned": lambda: x.unsqueeze(0).transpose(0, -1).select(-1, 0).permute(*range(1, x.rank), 0),
            "permuted": lambda: x.permute(*range(x.rank)),
            "times one": lambda: x * 1.0,
            "by one": lambda: x / 1,
            "minus nothing": lambda: x - 0,
            "expanded": lambda: x.expand(x.shape),
            "sliced": lambda: x[..., 0:last],
            "cut and joined": lambda: torch.cat(torch.split(x, [1, last - 1], dim=-1), dim=-1) if last > 1 else x,
            "doubled and halved": lambda: (x + x) * 0.5,
        }
        return ways[self.pick(list(ways))]()

    def waste(self, x: Any) -> None:
        """A call that nobody reads."""
        if self.rarely():
            torch.tanh(x)

    # Parts

    def linear(self, x: Any, rows: int, bias: bool) -> Any:
        """x·Wᵀ + b in one of its spellings."""
        columns, way = x.shape[-1], self.pick(["linear", "linear", "added", "matmul", "addmm"])
        b = self.weight(rows) if bias else None
        if way == "linear":
            y = F.linear(x, self.weight(rows, columns), b)
        elif way == "addmm" and b is not None:
            y = torch.addmm(b, x.reshape(-1, columns), self.weight(columns, rows)).view(*x.shape[:-1], rows)
        else:
            matrix = self.weight(columns, rows) if way == "addmm" else self.weight(rows, columns)
            y = torch.matmul(x, matrix if way == "addmm" else matrix.T) if way != "added" else F.linear(x, matrix)
            y = y if b is None else b + y if self.maybe() else y + b
        if self.rarely():
            y = y + self.weight(self.pick((1, rows)))
        return self.detour(y)

    def norm(self, x: Any) -> Any:
        x = self.detour(x)
        width, wide = x.shape[-1], torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        match self.pick(["rms", "rms", "rms_norm", "layer_norm", "plain"]):
            case "rms":
                h = x.to(wide)
                h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
                w = self.weight(width)
                if self.rarely():
                    w = w + 1.0
                h = h.to(self.dtype)
                return w * h if self.maybe() else h * w
            case "rms_norm":
                return torch.rms_norm(x, (width,), self.weight(width), 1e-5)
            case "layer_norm":
                bias = self.weight(width) if self.maybe() else None
                return F.layer_norm(x, (width,), self.weight(width), bias, 1e-5)
        return F.layer_norm(x, (width,))

    def activation(self, x: Any) -> Any:
        match self.pick(["silu", "silu", "gelu", "tanh", "by hand", "squared"]):
            case "silu":
                return F.silu(x)
            case "gelu":
                return F.gelu(x)
            case "tanh":
                return F.gelu(x, approximate="tanh")
            case "by hand":
                return x * torch.sigmoid(x)
        return torch.square(F.relu(x))

    def mlp(self, x: Any) -> Any:
        wide, bias = self.pick([8, 12]), self.maybe()
        match self.pick(["gated", "gated", "joined", "plain"]):
            case "gated":
                gate, up = self.linear(x, wide, bias), self.linear(x, wide, bias and self.maybe())
            case "joined":
                both = self.linear(x, 2 * wide, bias)
                gate, up = both.chunk(2, dim=-1) if self.maybe() else torch.split(both, [wide, wide], dim=-1)
            case _:
                return self.linear(self.activation(self.linear(x, wide, bias)), self.hidden, bias)
        gate = self.activation(gate)
        inner = gate * up if self.maybe() else up * gate
        return self.linear(self.detour(inner), self.hidden, bias)

    def residual(self, x: Any, y: Any) -> Any:
        if self.rarely():
            y = y * self.factor(self.pick([0.22, 2.0]))
        y = self.detour(y)
        return x + y if self.maybe() else y + x

    # Attention

    def split_heads(self, x: Any, heads: int) -> Any:
        """`[…, tokens, heads·size]` -> `[1, heads, tokens, size]`."""
        size = self.head_dim
        if not self.batched:
            x = x.unsqueeze(0)
        match self.pick(["view", "reshape", "unflatten", "permute"]):
            case "view":
                return x.view(1, TOKENS, heads, size).transpose(1, 2)
            case "reshape":
                return x.reshape(1, -1, heads, size).transpose(2, 1)
            case "unflatten":
                return x.unflatten(-1, (heads, size)).transpose(1, 2)
        return x.view(1, TOKENS, heads, size).permute(0, 2, 1, 3)

    def join_heads(self, x: Any) -> Any:
        """`[1, heads, tokens, size]` -> `[…, tokens, heads·size]`."""
        x = x.transpose(1, 2) if self.maybe() else x.permute(0, 2, 1, 3)
        x = x.contiguous() if self.maybe() else x
        x = x.reshape(1, TOKENS, self.heads * self.head_dim) if self.maybe() else x.flatten(2)
        return x if self.batched else x.squeeze(0) if self.maybe() else x[0]

    def projections(self, x: Any) -> tuple[Any, Any, Any]:
        queries, keys, bias = self.heads * self.head_dim, self.groups * self.head_dim, self.maybe()
        if self.rarely():
            parts = torch.split(self.linear(x, queries + 2 * keys, bias), [queries, keys, keys], dim=-1)
        else:
            parts = [self.linear(x, rows, bias) for rows in (queries, keys, keys)]
        q, k, v = (
            self.split_heads(part, n) for part, n in zip(parts, (self.heads, self.groups, self.groups), strict=True)
        )
        if self.rarely():
            q, k = self.norm(q), self.norm(k)
        return q, k, v

    def rotate(self, x: Any, angles: Any) -> Any:
        """x `[1, heads, tokens, size]`, angles `[tokens, size / 2]`."""
        half, lead = self.head_dim // 2, self.pick([(), (None,), (None, None)])
        if self.positional == "interleaved":
            cos, sin = (f(angles).to(self.dtype)[lead] for f in (torch.cos, torch.sin))
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        both = torch.cat([angles, angles], dim=-1)
        cos, sin = (f(both).to(self.dtype)[lead] for f in (torch.cos, torch.sin))
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos + turned * sin if self.maybe() else turned * sin + x * cos

    def angles(self) -> Any:
        """`[tokens, size / 2]`."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        frequencies = self.table(torch.logspace(0, -1, self.head_dim // 2, dtype=wide))
        return self.positions.to(wide)[:, None] * frequencies[None, :]

    def repeat(self, x: Any) -> Any:
        copies = self.heads // self.groups
        if copies == 1 and not self.rarely():
            return x
        if self.maybe():
            return x.repeat_interleave(copies, dim=1)
        wide = x[:, :, None].expand(1, self.groups, copies, TOKENS, self.head_dim)
        return wide.reshape(1, self.heads, TOKENS, self.head_dim)

    def slopes(self) -> torch.Tensor | None:
        if self.positional != "alibi":
            return None
        return torch.pow(2.0, -torch.arange(1, self.heads + 1)).to(self.dtype)

    def attention(self, x: Any) -> Any:
        q, k, v = self.projections(x)
        if self.positional in ("rotary", "interleaved"):
            angles = self.once("angles", self.angles)
            q, k = self.rotate(q, angles), self.rotate(k, angles)
        window = self.pick([None, None, None, 1, 3, 6])
        way = self.pick(["spelled", "spelled", "spelled", "fused", "operator"])
        result = {"spelled": self.spelled, "fused": self.fused, "operator": self.operator}[way](q, k, v, window)
        return self.linear(self.join_heads(self.detour(result)), self.hidden, self.maybe())

    def operator(self, q: Any, k: Any, v: Any, window: int | None) -> Any:
        """Our own operator, as models give it that leave their attention to the library."""
        slopes = self.slopes()
        slopes = None if slopes is None else self.table(slopes)
        cap = self.pick([None, None, 5.0])
        sinks = self.weight(self.heads) if self.rarely() else None
        if self.rarely():
            k, v = self.repeat(k), self.repeat(v)
        rows = (t[0].transpose(0, 1) if self.maybe() else t.transpose(1, 2).squeeze(0) for t in (q, k, v))
        y = ops.attention(*rows, self.head_dim**-0.5, True, window, cap, sinks, slopes)
        return y.transpose(0, 1)[None]

    def seen(self, window: int | None, rank: int) -> Any:
        return self.once(f"mask {window} {rank}", lambda: self.mask(window, rank))

    def mask(self, window: int | None, rank: int) -> Any:
        """`[tokens, tokens]`, true where a query sees a key; perhaps with sizes of one before, up to `rank`."""
        if window is None and self.maybe():
            table = self.table(torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[None, None])
            self.network.ranges["tokens"] = (1, LONGEST)
            return table[:, :, :TOKENS, :TOKENS] if rank == 4 else table[0, :, :TOKENS, :TOKENS]
        place = self.arange()
        rows, columns = place[:, None], place[None, :]
        seen = columns <= rows if self.maybe() else torch.ge(rows, columns)
        if window is not None:
            near = columns > rows - window if self.maybe() else rows - columns < window
            seen = seen & near if self.maybe() else torch.logical_and(near, seen)
        return seen[(None,) * (rank - 2)] if self.maybe() else seen

    def least(self) -> float:
        return self.pick([torch.finfo(torch.bfloat16).min, -torch.inf, -1e9])

    def masked(self, scores: Any, window: int | None) -> Any:
        seen, least = self.seen(window, scores.rank), self.least()
        match self.pick(["added", "filled", "where"]):
            case "added":
                bias = torch.where(seen, 0.0, least).to(scores.dtype)
                return scores + bias if self.maybe() else bias + scores
            case "filled":
                return scores.masked_fill(~seen, least)
        return torch.where(seen, scores, least)

    def biased(self, scores: Any) -> Any:
        """ALiBi: slope · j, or slope · (j − i), which the softmax cannot tell apart."""
        slopes = self.slopes()
        if slopes is None:
            return scores
        place = self.arange()
        distance = place[None, :] - place[:, None] if self.maybe() else place[None, :]
        bias = self.table(slopes)[:, None, None] * distance.to(self.dtype)
        bias = bias.to(scores.dtype)
        return scores + (bias[None] if scores.rank == 4 and self.maybe() else bias)

    def spelled(self, q: Any, k: Any, v: Any, window: int | None) -> Any:
        """softmax(scale · q·kᵀ + mask)·v by hand."""
        k, v = self.repeat(k), self.repeat(v)
        scale, way = (
            self.head_dim**-0.5,
            self.pick(["on q", "on k", "times", "by", "mask first", "baddbmm", "half and half"]),
        )
        flat = way == "baddbmm" or self.rarely()
        if flat:
            q, k, v = (t.reshape(self.heads, TOKENS, self.head_dim) for t in (q, k, v))
        if way == "on q":
            q = q * scale
        elif way == "on k":
            k = k * scale
        elif way == "half and half":
            q, k = q * scale**0.5, k * scale**0.5
        keys = k.transpose(-1, -2) if self.maybe() else k.permute(*range(k.rank - 2), -1, -2)
        if way == "baddbmm":
            zeros = torch.zeros(1, 1, 1, dtype=self.dtype)
            scores = torch.baddbmm(self.table(zeros), q, keys, beta=self.pick([0.0, 1.0]), alpha=scale)
        else:
            scores = torch.bmm(q, keys) if flat else torch.matmul(q, keys)
        if way == "times":
            scores = scale * scores if self.maybe() else scores * scale
        elif way == "by":
            scores = scores / self.head_dim**0.5
        if way == "mask first":
            scores = self.masked(scores, window) * scale
            scores = self.biased(scores)
        else:
            scores = (
                self.biased(scores) if self.maybe() else scores if self.positional != "alibi" else self.biased(scores)
            )
            scores = self.masked(scores, window)
        weights = self.softmax(scores)
        weights = F.dropout(weights, 0.1, training=False) if self.maybe() else weights
        result = torch.bmm(weights, v) if flat else torch.matmul(weights, v)
        return result.view(1, self.heads, TOKENS, self.head_dim) if flat else result

    def softmax(self, scores: Any) -> Any:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        match self.pick(["plain", "dtype", "cast"]):
            case "plain":
                return torch.softmax(scores, dim=-1)
            case "dtype":
                return F.softmax(scores, dim=-1, dtype=wide).to(self.dtype)
        return torch.softmax(scores.to(wide), -1).to(self.dtype)

    def fused(self, q: Any, k: Any, v: Any, window: int | None) -> Any:
        """torch's scaled_dot_product_attention."""
        grouped = self.rarely()
        if not grouped:
            k, v = self.repeat(k), self.repeat(v)
        options: dict[str, Any] = {"scale": 0.3} if self.maybe() else {}
        if grouped:
            options["enable_gqa"] = True
        if window is None and self.positional != "alibi" and self.maybe():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        mask = self.seen(window, q.rank)
        if self.positional == "alibi" or self.maybe():
            mask = torch.where(mask, 0.0, self.least()).to(self.dtype)
            mask = self.biased(mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    # The whole

    def block(self, x: Any, number: int) -> Any:
        with self.module(f"model.layers.{number}.self_attn"):
            normed = self.norm(x)
            again = self.norm(x) if self.rarely() else normed
            self.waste(normed)
            attended = self.attention(normed)
        with self.module(f"model.layers.{number}.mlp"):
            if self.rarely():  # both branches read the same norm, as in GPT-J
                return self.residual(self.residual(x, attended), self.mlp(again))
            x = self.residual(x, attended)
            return self.residual(x, self.mlp(self.norm(x)))

    def decoder(self) -> Network:
        network = self.network
        token_ids = network.add_input("token_ids", (TOKENS,), torch.int64)
        self.positions: Any = network.add_input("positions", (TOKENS,), torch.int64)
        vocabulary = self.pick([11, 40])
        table = self.weight(vocabulary, self.hidden)
        x: Any = F.embedding(token_ids[None] if self.batched else token_ids, table)
        if self.rarely():
            x = x * self.factor(self.hidden**0.5)
        if self.positional == "learned":
            x = x + F.embedding(self.positions, self.weight(LONGEST, self.hidden))
        tape: list[Any] | None = None
        for number in range(self.layers):
            if tape is None or self.rarely():
                self.pick = recorder(self.fresh, tape := [])
            else:
                self.pick = player(self.fresh, tape)
            x = self.block(x, number)
            self.pick = self.fresh
        x = self.norm(x)
        logits = F.linear(x, table) if self.maybe() else self.linear(x, vocabulary, self.rarely())
        if self.rarely():
            logits = torch.tanh(logits / 5.0) * 5.0
        logits = self.detour(logits)
        if self.batched:
            logits = logits.squeeze(0) if self.maybe() else logits[0]
        network.set_output("logits", logits)
        network.verify()
        return network


def recorder(pick: Pick, tape: list[Any]) -> Pick:
    def choose(choices: Sequence[Any]) -> Any:
        tape.append(pick(choices))
        return tape[-1]

    return choose


def player(pick: Pick, tape: Sequence[Any]) -> Pick:
    """The choices on the tape again; now and then another one, behind which they may not fit any more."""
    rest = iter(tape)
    slips = pick((False, False, False, True))

    def choose(choices: Sequence[Any]) -> Any:
        same = next(rest, None)
        fits = any(type(same) is type(choice) and same == choice for choice in choices)
        return same if fits and not (slips and pick((False,) * 30 + (True,))) else pick(choices)

    return choose


def _drawn(draw: Callable[[st.SearchStrategy], Any]) -> Pick:
    """Choices of hypothesis, which it can shrink, but examples are much alike; or of a seed, all different."""
    if draw(st.booleans()):
        return random.Random(draw(st.integers(0, 2**63))).choice
    return lambda choices: draw(st.sampled_from(choices))


@st.composite
def decoders(draw: Callable[[st.SearchStrategy], Any], layers: Sequence[int] = (1, 1, 2)) -> Network:
    """One output, `logits`. Most layers after the first are spelled as it is."""
    return Writer(_drawn(draw), layers).decoder()


@st.composite
def decoders_with_more_outputs(draw: Callable[[st.SearchStrategy], Any]) -> Network:
    """Up to three values of the inside are outputs too, perhaps one of them twice."""
    writer = Writer(_drawn(draw))
    network = writer.decoder()
    for number in range(writer.pick((1, 2, 3))):
        network.set_output(f"inner_{number}", writer.pick(writer.values))
    return network
