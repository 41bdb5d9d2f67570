"""Other rewriting systems on the job of `rewriting_graphs.transformer`: the same 17 calls per layer, the same rules.

A peer is a module here that defines `PEERS`. Those whose package is not installed are named with the reason.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple, Protocol

MODULES = ("replace_pattern", "inductor", "fx_by_hand", "xdsl_rewriter", "onnxscript_rewriter", "tinygrad_rewriter")


class Fused(NamedTuple):
    """Calls of the three fused operators: what a rewritten network must have one, one and two of per layer."""

    attention_with_bias: int
    silu_mul: int
    add_rms_norm: int


def wanted(layers: int) -> Fused:
    return Fused(layers, layers, 2 * layers)


class Peer(Protocol):
    name: str
    package: str
    """the distribution whose version is recorded"""
    most_layers: int
    """larger networks are left to --full: they take longer than all the rest together"""

    def prepare(self, layers: int) -> Any:
        """The network in the peer's own form; not timed."""

    def run(self, subject: Any) -> None:
        """Applies the three rules in place; timed. What can be made once for all networks is made in __init__."""

    def fused(self, subject: Any) -> Fused:
        """What the rewritten network has. Raises ValueError if its order or its use-lists are broken."""


def load() -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, and for each module that cannot the reason."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name in MODULES:
        try:
            module = import_module(f"peers.{name}")
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed: run `make peers`"
        else:
            peers += [kind() for kind in module.PEERS]
    return peers, missing
