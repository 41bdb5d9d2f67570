"""Match one, apply to all: what a phase costs on a decoder of equal layers, with and without repeating answers.

    python benchmarks/repeated_layers.py [--layers 32 100 1000] [--rounds 5] [--write]

Per depth, microseconds of process time per layer of the network as imported (60 calls per decoder layer), medians over
rounds in which both take turns; the rewritten networks and reports are compared in every round. Then how often rules'
code ran: that follows the number of distinct decoder layers.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterator
from time import process_time
from typing import Any

import torch
from torch.nn import functional as F

from enginery import ops
from enginery.network import Dim, Network, Tensor
from enginery.rewriting import PatternRewriter, RewritePatternManager
from enginery.rewriting.pipeline import PHASES
from record import record

TOKENS, HEADS, GROUPS, SIZE, WIDE = Dim.symbol("tokens"), 4, 2, 16, 128
HIDDEN = HEADS * SIZE


def decoder(layers: int) -> Network:
    """Llama as torch.export gives it: `x [1, tokens, hidden], positions [tokens] -> [1, tokens, hidden]`."""
    network = Network()
    x: Any = network.add_input("x", (1, TOKENS, HIDDEN), torch.float32)
    positions: Any = network.add_input("positions", (TOKENS,), torch.int64)
    with network.inserting_before(None, module_path="model.rotary_emb"):
        angles = positions.unsqueeze(0).unsqueeze(2).to(torch.float32) * weight(network, "inv_freq", SIZE // 2)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = torch.cos(angles) * 1.0, torch.sin(angles) * 1.0
    for number in range(layers):
        x = decoder_layer(network, f"model.layers.{number}", x, cos, sin)
    network.set_output("out", x)
    return network


def decoder_layer(network: Network, path: str, x: Any, cos: Any, sin: Any) -> Any:
    normed = norm(network, f"{path}.input_layernorm", x)
    with network.inserting_before(None, module_path=f"{path}.self_attn"):
        query, key, value = (
            F.linear(normed, weight(network, f"{path}.self_attn.{name}", heads * SIZE, HIDDEN))
            .view(1, TOKENS, -1, SIZE)
            .transpose(1, 2)
            for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))
        )
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        query, key = (rows * cos + half_turned(rows) * sin for rows in (query, key))
        rows = [rows.select(0, 0).transpose(0, 1) for rows in (query, key, value)]
        mixed: Any = ops.attention(*rows, SIZE**-0.5, True)
        mixed = mixed.transpose(0, 1).unsqueeze(0).transpose(1, 2).contiguous().reshape(1, TOKENS, -1).contiguous()
        mixed = F.linear(mixed, weight(network, f"{path}.self_attn.o", HIDDEN, HIDDEN))
    with network.inserting_before(None, module_path=path):
        x = x + mixed
    normed = norm(network, f"{path}.post_attention_layernorm", x)
    with network.inserting_before(None, module_path=f"{path}.mlp"):
        gate, up = (F.linear(normed, weight(network, f"{path}.mlp.{name}", WIDE, HIDDEN)) for name in ("gate", "up"))
        down = F.linear(F.silu(gate) * up, weight(network, f"{path}.mlp.down", HIDDEN, WIDE))
    with network.inserting_before(None, module_path=path):
        return x + down


def norm(network: Network, path: str, x: Any) -> Any:
    with network.inserting_before(None, module_path=path):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight(network, f"{path}.weight", HIDDEN) * wide.to(torch.float32)


def half_turned(x: Any) -> Any:
    return torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], dim=-1)


def weight(network: Network, name: str, *shape: int) -> Tensor:
    return network.add_constant(name, shape, torch.float32)


def phases() -> Iterator[tuple[str, list[type[PatternRewriter]]]]:
    for phase in PHASES:
        if phase.rules and phase.prepare is None and not phase.name.startswith("recognise"):
            yield phase.name, list(phase.rules)


def counted(rules: list[type[PatternRewriter]], calls: list[str]) -> list[PatternRewriter]:
    """The rules; each call of their code adds to `calls`."""

    def of(rule: type[PatternRewriter]) -> PatternRewriter:
        def match_and_rewrite(self: Any, layer: Any) -> Any:
            calls.append(rule.__name__)
            return rule.match_and_rewrite(self, layer)

        return type(rule.__name__, (rule,), {"match_and_rewrite": match_and_rewrite})()

    return [of(rule) if "match_and_rewrite" in vars(rule) else rule() for rule in rules]


def rewritten(layers: int, remember: bool, rules: list[PatternRewriter]) -> tuple[float, str, Any]:
    network = decoder(layers)
    network.verify = lambda: None  # type: ignore[method-assign]
    size, manager = len(network), RewritePatternManager(*rules)
    gc.collect()
    start = process_time()
    report = manager.rewrite(network, remember=remember)
    return (process_time() - start) / size * 1e6, str(network), report


def compare(layers: int, rules: list[type[PatternRewriter]], rounds: int) -> dict[str, Any]:
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        results = {way: rewritten(layers, way, [rule() for rule in rules]) for way in times}
        (_, plain, asked), (_, fast, repeated) = results.values()
        if plain != fast or asked.applications != repeated.applications or asked.diff(repeated):
            raise SystemExit("repeating answers gave another result")
        for way, (value, _, _) in results.items():
            times[way].append(value)
    calls: dict[bool, list[str]] = {False: [], True: []}
    for way, made in calls.items():
        rewritten(layers, way, counted(rules, made))
    each, some = statistics.median(times[False]), statistics.median(times[True])
    return {
        "asked everywhere, µs": round(each, 1),
        "repeated, µs": round(some, 1),
        "ratio": round(statistics.median(b / a for a, b in zip(times[False], times[True], strict=True)), 2),
        "calls of rules": len(calls[False]),
        "calls where repeated": len(calls[True]),
        "rewrites": repeated.rewritten,
        "of them repeated": sum(rule.replayed for rule in repeated.rules.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = dict(phases())
    rewritten(4, True, [rule() for rule in found["canonicalise"]])
    results = {
        f"{name}, {layers} layers": compare(layers, rules, options.rounds if layers < 1000 else min(options.rounds, 3))
        for name, rules in found.items()
        for layers in options.layers
        if name in ("canonicalise", "merge linears", "fold")
    }
    record("repeated_layers", results, table=results, write=options.write)


if __name__ == "__main__":
    main()
