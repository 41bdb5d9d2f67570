"""Hypothesis strategies: small random networks that are valid, with inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional

from enginery.network import Dim, Network, Tensor

Draw = Callable[[st.SearchStrategy], Any]
Maker = Callable[[Draw, Network, list[Tensor]], Any]

WIDTH = 8
TOKENS = Dim.symbol("tokens")


def _pick(draw: Draw, values: list[Tensor], accept: Callable[[Tensor], bool] = lambda value: True) -> Tensor | None:
    fitting = [value for value in values if value.dtype == torch.float32 and accept(value)]
    return draw(st.sampled_from(fitting)) if fitting else None


def _unary(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    function = draw(
        st.sampled_from([torch.relu, functional.silu, torch.sigmoid, torch.tanh, torch.neg, torch.exp, torch.square])
    )
    return function(
        torch.clamp(_pick(draw, values), -4.0, 4.0) if function in (torch.exp, torch.square) else _pick(draw, values)
    )


def _binary(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    left = _pick(draw, values)
    right = _pick(draw, values, lambda value: value.shape == left.shape)
    function = draw(st.sampled_from([torch.add, torch.sub, torch.mul, torch.maximum]))
    return function(torch.tanh(left), right) if function is torch.mul else function(left, right)


def _scalar(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    value = _pick(draw, values)
    number = draw(st.sampled_from([0.5, 2, -1.0, 1, 0]))
    return draw(st.sampled_from([lambda: value + number, lambda: value * number, lambda: number - value]))()


def _linear(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    value = _pick(
        draw, values, lambda value: value.rank >= 2 and isinstance(value.shape[-1], int) and not value.is_constant
    )
    if value is None:
        return None
    number, out = len(network.constants), draw(st.sampled_from([4, WIDTH, 12]))
    weight = network.add_constant(f"weight_{number}", (out, value.shape[-1]), torch.float32)
    bias = network.add_constant(f"bias_{number}", (out,), torch.float32) if draw(st.booleans()) else None
    return functional.linear(torch.tanh(value), weight, bias)


def _views(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    value = _pick(draw, values, lambda value: value.rank == 2 and value.shape[0] == TOKENS)
    if value is None:
        return None
    tokens, width = value.shape
    choices = [
        lambda: value.unsqueeze(0).squeeze(0),
        lambda: value.transpose(0, 1).transpose(0, 1),
        lambda: value.float(),
        lambda: torch.cat([value, value], dim=-1)[:, :width],
        lambda: value.reshape(-1, width),
    ]
    if isinstance(width, int) and width % 2 == 0:
        choices.append(lambda: torch.split(value, [width // 2, width // 2], dim=-1))
        choices.append(lambda: value.view(tokens, 2, width // 2).transpose(1, 2))
        choices.append(lambda: value.chunk(2, dim=-1))
    return draw(st.sampled_from(choices))()


def _reduce(draw: Draw, network: Network, values: list[Tensor]) -> Any:
    value = _pick(draw, values, lambda value: value.rank >= 1)
    choices = [
        lambda: value.softmax(-1),
        lambda: value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda: value - value.mean(-1, keepdim=True),
        lambda: value.amax(-1, keepdim=True) - value,
        lambda: torch.cumsum(value, dim=-1),
    ]
    return draw(st.sampled_from(choices))()


MAKERS: tuple[Maker, ...] = (_unary, _binary, _binary, _scalar, _linear, _linear, _views, _reduce)


@st.composite
def networks(draw: Draw, max_layers: int = 12) -> Network:
    """A network over `x [tokens, 8]` and constants, of a few dozen calls at most, some with several outputs or none
    that read them.
    """
    network = Network()
    values = [network.add_input("x", (TOKENS, WIDTH), torch.float32)]
    if draw(st.booleans()):
        values.append(network.add_input("y", (TOKENS, WIDTH), torch.float32))
    if draw(st.booleans()):
        values.append(network.add_constant("table", (WIDTH,), torch.float32))
    for _ in range(draw(st.integers(1, max_layers))):
        made = draw(st.sampled_from(MAKERS))(draw, network, values)
        if made is not None:
            values += made if isinstance(made, tuple) else [made]
    results = draw(st.lists(st.sampled_from(values[-4:]), min_size=1, max_size=3))
    for number, result in enumerate([values[-1], *results]):
        network.set_output(f"out_{number}", result)
    return network


def inputs_for(network: Network, tokens: int = 5, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Random inputs and constants for a network of `networks()`."""
    generator = torch.Generator().manual_seed(seed)

    def sample(tensor: Tensor) -> torch.Tensor:
        shape = [size.substitute({"tokens": tokens}) if isinstance(size, Dim) else size for size in tensor.shape]
        return torch.randn(shape, generator=generator) * 0.5

    return [sample(tensor) for tensor in network.inputs], {tensor.name: sample(tensor) for tensor in network.constants}
