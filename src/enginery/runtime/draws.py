"""Ways to draw a token from logits, a row each by its own parameters and one uniform number.

A draw inverts the cumulative distribution. Masses are whole numbers, multiples of 2^-40 of the row's largest
probability: sums of them are exact in any order, so a token of mass 0 is never drawn, and a row gives the same token
in any batch, however a device orders its sums. Floats are summed only within blocks of 64 tokens.

Of equally likely tokens, top_k takes those of smaller id; top_p keeps all that are as likely as the last it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enginery import ops
from enginery.runtime.candidates import BLOCK, candidates_on_device, candidates_on_host

CANDIDATES = 128
"""Most likely tokens that a draw looks at first, and as many as a narrow one needs."""
_UNIT = 2.0**40
"""The mass of a row's most likely token."""
_BELOW_1 = 1.0 - 2.0**-53
_DIGIT = 2**16
"""Values of a digit of a weight's bits."""


@dataclass(slots=True)
class Parameters:
    """Columns `[M, 1]` on the device of the logits."""

    best: Tensor
    """float32, the largest logit"""
    temperature: Tensor
    """float32"""
    top_k: Tensor
    """int64"""
    top_p: Tensor
    """float64"""
    noise: Tensor
    """float64"""
    min_p: Tensor | None
    """float32; None: 0 everywhere"""
    most: int
    """No smaller than any top_k, on the host."""


class Draws:
    """Draws that never look at what they compute, so the host need not wait for it. Each takes logits `[M, V]`, which
    it may write to, and gives token ids `[M]`, int64; those of a row without a distribution mean nothing but are
    within V.
    """

    max_elements = 2**22
    """Logits drawn from at once; about 40 bytes each are needed for the time of the draw."""

    def max_rows(self, vocab_size: int) -> int:
        """Rows to be drawn from at once."""
        return max(1, self.max_elements // max(vocab_size, _DIGIT))

    def greatest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of each row, NaN if there is one, and its column; of equal ones the first."""
        best, token_ids = ops.greatest(logits)
        return best, token_ids

    def ranked(self, logits: Tensor, parameters: Parameters) -> Tensor:
        """min_p, top_k, then top_p."""
        values, columns = self._candidates(logits, min(parameters.most, logits.shape[1]))
        masses = _masses(self._weights(values, parameters))
        ranks = torch.arange(masses.shape[1], device=logits.device)
        masses.masked_fill_(ranks >= parameters.top_k, 0)
        floor = masses.gather(1, _last_kept(masses, parameters.top_p, masses.sum(dim=1, keepdim=True)))
        return columns.gather(1, _invert(masses.masked_fill_(masses < floor, 0), parameters.noise)).squeeze(1)

    def open(self, logits: Tensor, parameters: Parameters) -> Tensor:
        """min_p only."""
        return _descend(self._weights(logits, parameters), parameters.noise)

    def nucleus(self, logits: Tensor, parameters: Parameters) -> Tensor:
        """min_p, then top_p."""
        weights = self._weights(logits, parameters)
        floor = nucleus_floor(weights, parameters.top_p)
        return _descend(weights.masked_fill_(weights < floor, 0.0), parameters.noise)

    def _candidates(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return candidates_on_device(logits, count)

    def _weights(self, logits: Tensor, parameters: Parameters) -> Tensor:
        """Probabilities over the row's largest, in place of the logits; below min_p, 0."""
        weights = self._exp(logits.sub_(parameters.best).div_(parameters.temperature))
        return weights if parameters.min_p is None else weights.masked_fill_(weights < parameters.min_p, 0.0)

    def _exp(self, values: Tensor) -> Tensor:
        return values.exp_()


class HostDraws(Draws):
    """The same draws, to the same tokens but for rounding, where the logits are on the host: looking is free there, and
    numpy is faster than torch."""

    max_elements = 2**40

    def greatest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        array = logits.float().numpy()
        token_ids = array.argmax(axis=1)
        return torch.from_numpy(array[np.arange(len(array)), token_ids]), torch.from_numpy(token_ids)

    def nucleus(self, logits: Tensor, parameters: Parameters) -> Tensor:
        """Among few candidates, if they hold the nucleus."""
        values, columns = self._candidates(logits, min(CANDIDATES, logits.shape[1]))
        masses = _masses(self._weights(values, parameters))
        weights = self._weights(logits, parameters)
        total = _block_sums(weights).double().sum(dim=1, keepdim=True) * _UNIT
        floor = masses.gather(1, _last_kept(masses, parameters.top_p, total))
        goes_on = (masses[:, -1:] >= floor).squeeze(1)
        by_column = torch.from_numpy(np.argsort(columns.numpy(), axis=1))  # the order in which a device draws
        masses = masses.masked_fill_(masses < floor, 0).gather(1, by_column)
        token_ids = columns.gather(1, by_column).gather(1, _invert(masses, parameters.noise)).squeeze(1)
        if goes_on.any():
            weights, noise = weights[goes_on], parameters.noise[goes_on]
            floor = _nucleus_floor_by_sort(weights, parameters.top_p[goes_on])
            token_ids[goes_on] = _descend(weights.masked_fill_(weights < floor, 0.0), noise)
        return token_ids

    def _candidates(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return candidates_on_host(logits, count)

    def _exp(self, values: Tensor) -> Tensor:
        np.exp(values.numpy(), out=values.numpy())
        return values


def nucleus_floor(weights: Tensor, top_p: Tensor) -> Tensor:
    """`[M, 1]`, of weights `[M, V]` in [0, 1], float32: the largest weight such that those not below it hold `top_p`
    of the sum.

    The bits of such numbers order them, so the floor is found like a key by radix, in two digits of 16 bits: the mass
    of each value of the digit, then the value at which the mass from below reaches what is left out.
    """
    size = weights.shape[1]
    digits = weights.view(torch.uint16).unflatten(1, (size, 2))
    masses = _masses(weights)
    bits = torch.zeros(len(weights), 1, dtype=torch.int64, device=weights.device)
    left_out: Tensor | None = None
    for place in (1, 0):  # the upper half of a float32 lies behind the lower one
        digit = digits[:, :, place].to(torch.int64)
        histogram = masses.new_zeros(len(weights), _DIGIT).scatter_add_(1, digit, masses)
        cumulative = histogram.cumsum(dim=1)
        if left_out is None:
            total = cumulative[:, -1:]
            left_out = total - (top_p * total).ceil().to(torch.int64)
        found = torch.searchsorted(cumulative, left_out, right=True).clamp_(max=_DIGIT - 1)
        left_out = left_out - (cumulative.gather(1, found) - histogram.gather(1, found))
        masses = masses.masked_fill_(digit != found, 0)
        bits = bits * _DIGIT + found
    return bits.to(torch.int32).view(torch.float32)


def _nucleus_floor_by_sort(weights: Tensor, top_p: Tensor) -> Tensor:
    """`nucleus_floor` on a host, where a sort is faster than counting."""
    ordered = torch.from_numpy(np.sort(weights.numpy(), axis=1)).flip(1)
    masses = _masses(ordered)
    return ordered.gather(1, _last_kept(masses, top_p, masses.sum(dim=1, keepdim=True)))


def _last_kept(masses: Tensor, top_p: Tensor, total: Tensor) -> Tensor:
    """`[M, 1]`, of masses `[M, K]`, largest first: the place of the least one that top_p keeps. A token stays while
    the mass before it is less than top_p of the total: the one that crosses the line stays too."""
    before = masses.cumsum(dim=1) - masses
    return ((before < top_p * total).sum(dim=1, keepdim=True) - 1).clamp_(min=0)


def _descend(weights: Tensor, noise: Tensor) -> Tensor:
    """Two steps down a tree: a block by its mass, then a token of the block."""
    masses = _masses(_block_sums(weights))
    cumulative = masses.cumsum(dim=1)
    block = _invert_cumulative(cumulative, noise)
    mass = masses.gather(1, block)
    below = cumulative.gather(1, block) - mass
    rest = ((noise * cumulative[:, -1:] - below) / mass).clamp_(0.0, _BELOW_1)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    last = weights.shape[1] - 1
    inside = weights.gather(1, columns.clamp(max=last)).masked_fill_(columns > last, 0.0)
    # Over the block's own sum: its tokens may all be less than one unit of the row.
    place = _invert(_masses(inside / inside.sum(dim=1, keepdim=True)), rest)
    return (block * BLOCK + place).clamp_(max=last).squeeze(1)


def _block_sums(weights: Tensor) -> Tensor:
    """`[M, ceil(V / BLOCK)]`"""
    size = weights.shape[1]
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(dim=2)
    return sums if whole == size else torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)


def _masses(weights: Tensor) -> Tensor:
    return (weights * _UNIT).to(torch.int64)


def _invert(masses: Tensor, noise: Tensor) -> Tensor:
    return _invert_cumulative(masses.cumsum(dim=1), noise)


def _invert_cumulative(cumulative: Tensor, noise: Tensor) -> Tensor:
    """`[M, 1]`, the first place whose cumulative mass exceeds noise · total, so never one of mass 0."""
    total = cumulative[:, -1:]
    target = torch.minimum((noise * total).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
