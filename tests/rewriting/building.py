"""Small networks for the tests of rewriting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from enginery.network import Dim, Network, Tensor

TOKENS = Dim.symbol("tokens")


def network_of(
    function: Callable[..., Any], *, constants: str = "w v b c", dtype: torch.dtype = torch.float32
) -> Network:
    """Traces `function` over inputs and constants that its parameters name.

    Matrices w, v are [8, 8]; vectors b, c are [8]; everything else is an input [tokens, 8].
    """
    network = Network()
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = [value_named(network, name, constants.split(), dtype) for name in names]
    results = function(*values)
    for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
        network.set_output(f"out_{i}", result)
    network.verify()
    return network


def value_named(network: Network, name: str, constants: list[str], dtype: torch.dtype) -> Tensor:
    if name not in constants:
        return network.add_input(name, (TOKENS, 8), dtype)
    return network.add_constant(name, (8, 8) if name in ("w", "v") else (8,), dtype)


def ops_of(network: Network) -> list[str]:
    return [layer.op._schema.name.partition("::")[2] for layer in network]
