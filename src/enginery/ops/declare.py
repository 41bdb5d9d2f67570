"""How an operator enters the closed set: schema + eager reference + shape rule, declared once.

The reference is registered for every device (`CompositeExplicitAutograd`), so the system is complete, only slow,
without any kernel. A kernel registers itself for a device key (`CPU`, `CUDA`), which the dispatcher prefers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from enginery.ops.raised import keeping

NAMESPACE = "enginery"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """A declared operator. `overload` is what a network's layers hold, `reference` the oracle of its kernels."""

    name: str
    overload: torch._ops.OpOverload
    reference: Callable
    shape: Callable


def declare(schema: str, *, reference: Callable, shape: Callable) -> Op:
    """Registers `enginery::schema` and returns its handle.

    `shape` gives empty outputs for inputs without data (torch's "fake" rule). Arguments that the schema marks as
    written (`Tensor(a!)`) are barriers for rewriting.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, keeping(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_LIBRARY)
    return Op(name, getattr(getattr(torch.ops, NAMESPACE), name).default, reference, shape)
