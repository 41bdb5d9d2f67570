"""Running a network before and after: seeded values, and equality within what a dtype can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from enginery.errors import UsageError
from enginery.network.dim import evaluate, symbols_of
from enginery.network.network import Network
from enginery.network.tensor import Tensor

TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = MappingProxyType(
    {
        torch.float64: (1e-9, 1e-10),
        torch.float32: (1e-4, 1e-5),
        torch.float16: (1e-2, 1e-3),
        torch.bfloat16: (4e-2, 1e-2),
    }
)
"""Relative and absolute; the absolute one is a share of the largest element. Other dtypes must be equal."""

_SIZES = (5, 7, 11, 13)
"""distinct, so that a rule that exchanges two symbolic sizes is found out"""


@dataclass(frozen=True)
class Values:
    """What a network is run on: inputs in order, constants by name."""

    inputs: tuple[torch.Tensor, ...]
    constants: Mapping[str, torch.Tensor]


def sample_values(network: Network, given: Sequence[Any] | Mapping[str, Any] | bool = True, seed: int = 0) -> Values:
    """Seeded values for every input and for every constant without data; those that are given are kept.

    `given`: inputs in order, or inputs and constants by name. Integers are 0 or 1, which index any table of two rows.
    """
    named = _by_name(network, given)
    sizes = _sizes(network)
    generator = torch.Generator().manual_seed(seed)

    def value(tensor: Tensor) -> torch.Tensor:
        return named[tensor.name] if tensor.name in named else _sample(tensor, sizes, generator)

    constants = [tensor for tensor in network.constants if tensor.name not in network.values or tensor.name in named]
    return Values(tuple(map(value, network.inputs)), {tensor.name: value(tensor) for tensor in constants})


def run(network: Network, values: Values) -> tuple[torch.Tensor, ...]:
    """Inputs and constants that are written to are copied first; constants that the network dropped are left out."""
    present = {tensor.name for tensor in network.constants}
    constants = {name: value.clone() for name, value in values.constants.items() if name in present}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return tuple(network.run([value.clone() for value in values.inputs], constants))


def difference(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], names: Sequence[str]) -> str:
    """What the outputs differ in, in words; empty if they are equal within tolerance."""
    for name, old, new in zip(names, before, after, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"output {name} was {_type(old)} and is {_type(new)}"
        relative, absolute = TOLERANCES.get(old.dtype, (0.0, 0.0))
        wide = old.double() if not old.is_complex() else old
        largest = wide.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if old.numel() else 0.0
        if not torch.allclose(
            new.to(wide.dtype), wide, rtol=relative, atol=absolute * max(largest, 1e-30), equal_nan=True
        ):
            error = (new.to(wide.dtype) - wide).abs().nan_to_num(math.inf).max().item()
            return f"output {name} differs by {error:.3g} where its largest element is {largest:.3g}"
    return ""


def _by_name(network: Network, given: Sequence[Any] | Mapping[str, Any] | bool) -> dict[str, torch.Tensor]:
    if isinstance(given, bool):
        return {}
    if isinstance(given, Mapping):
        known = {tensor.name for tensor in (*network.inputs, *network.constants)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise UsageError(
                f"the network has no input or constant named {unknown[0]}", f"It has: {', '.join(sorted(known))}"
            )
        return dict(given)
    if len(given) != len(network.inputs):
        raise UsageError(f"{len(given)} values are given for {len(network.inputs)} inputs", "Give one tensor per input")
    return {tensor.name: value for tensor, value in zip(network.inputs, given, strict=True)}


def _sizes(network: Network) -> dict[str, int]:
    """A number for each symbolic size, within its range."""
    symbols = symbols_of(size for tensor in (*network.inputs, *network.constants) for size in tensor.shape)
    sizes = {}
    for i, symbol in enumerate(sorted(symbols)):
        low, high = network.ranges.get(symbol, (1, None))
        wanted = max(_SIZES[i % len(_SIZES)], low)
        sizes[symbol] = wanted if high is None else min(wanted, high)
    return sizes


def _sample(tensor: Tensor, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [evaluate(size, sizes) for size in tensor.shape]
    if tensor.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return torch.randint(0, 2, shape, generator=generator).to(tensor.dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if tensor.is_constant and len(shape) > 1:
        values = values / math.sqrt(max(shape[-1], 1))
    return values.to(tensor.dtype)


def _type(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
