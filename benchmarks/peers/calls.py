"""The network as a plain list of calls, for peers with a graph of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from enginery.network.network import Network
from enginery.network.tensor import Tensor
from rewriting_graphs import attention

aten = torch.ops.aten

KINDS = {
    aten.linear.default: "linear",
    aten.add.Tensor: "add",
    aten.rms_norm.default: "rms_norm",
    aten.silu.default: "silu",
    aten.mul.Tensor: "mul",
    attention: "attention",
}


class Call(NamedTuple):
    kind: str
    inputs: list[Tensor]
    output: Tensor


def calls(network: Network) -> Iterator[Call]:
    for layer in network:
        yield Call(KINDS[layer.op], list(layer.inputs), layer.output)


def leaves(network: Network) -> tuple[Tensor, ...]:
    return (*network.inputs, *network.constants)
