"""Logits to tokens, for a whole batch at once, each row by its own parameters.

Which token a row gives depends on that row alone: its logits, its parameters and its noise, which is a function of
(seed, completion, position). A random row is drawn by inverting the cumulative distribution at one uniform number, so
a seeded request gives the same tokens in any batch. Rows are grouped by how much of the vocabulary must be looked at:

- greedy: the largest logit;
- narrow (top_k up to 128): the 128 most likely tokens;
- nucleus (top_p alone): the 128 most likely tokens, or more until they hold the nucleus;
- wide (top_k beyond that): a full sort;
- open (temperature and min_p only): no sort; the noise picks a block of the vocabulary by its mass, then a token in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enginery.runtime.batch import SamplingInputs
from enginery.runtime.edits import LogitsEdits

CANDIDATES = 128
"""Most likely tokens that a narrow row looks at."""
BLOCK = 64
"""Tokens per block of the vocabulary; a block is summed up by its largest logit or its mass."""


@dataclass(slots=True)
class TopLogprobs:
    """Logprobs of M rows: the chosen token's, its rank from 1, and the K most likely tokens, best first."""

    chosen: np.ndarray
    """`[M]` float32"""
    ranks: np.ndarray
    """`[M]` int64"""
    token_ids: np.ndarray
    """`[M, K]` int64"""
    values: np.ndarray
    """`[M, K]` float32"""


@dataclass(slots=True)
class Samples:
    """The outcome of R samples."""

    token_ids: list[int]
    failed: set[int]
    """Samples whose logits hold NaN or +inf, or nothing but bans; their token is meaningless."""
    logprobs: TopLogprobs | None
    logprobs_row: dict[int, int]
    """Sample -> row of `logprobs`"""


class Sampling:
    """R samples that are being drawn."""

    def __init__(self, token_ids: Tensor, samples: Samples) -> None:
        self.token_ids = token_ids
        """`[R]` int64 on the device of the logits, valid there in the order of its stream."""
        self._samples = samples

    def wait(self) -> Samples:
        """Blocks until the outcome is on the host."""
        return self._samples


class PendingLogprobs:
    """Logprobs that are being computed."""

    def __init__(self, logprobs: TopLogprobs) -> None:
        self._logprobs = logprobs

    def wait(self) -> TopLogprobs:
        """Blocks until they are on the host."""
        return self._logprobs


class Sampler:
    """Stateless. May write to the logits it is given."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Sampling:
        """Draws one token per entry of `inputs` from logits `[L, vocab_size]` float32."""
        rows = logits if inputs.rows is None else _take(logits, inputs.rows)
        wanted = np.flatnonzero(inputs.num_logprobs >= 0)
        raw = rows
        if inputs.edits is not None:
            rows = rows.clone() if len(wanted) else rows
            _apply_edits(rows, inputs.edits)
        token_ids, failed = _choose(rows, inputs)
        logprobs = None
        if len(wanted):
            chosen = torch.from_numpy(token_ids[wanted])
            logprobs = top_logprobs(_take(raw, wanted), chosen, int(inputs.num_logprobs.max())).wait()
        rows_of = {int(sample): row for row, sample in enumerate(wanted)}
        samples = Samples(token_ids.tolist(), failed, logprobs, rows_of)
        return Sampling(torch.from_numpy(token_ids).to(logits.device), samples)


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> PendingLogprobs:
    """Of logits `[M, V]` and chosen token ids `[M]`: see `TopLogprobs`, with K = `count`."""
    chosen = chosen.to(logits.device).unsqueeze(1)
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen_logits = logits.gather(1, chosen)
    # One column at least, so that the shapes below hold for count = 0.
    values, token_ids = top_candidates(logits, max(1, min(count, logits.shape[1])))
    logprobs = TopLogprobs(
        chosen=(chosen_logits - normalizer).squeeze(1).cpu().numpy(),
        ranks=((logits > chosen_logits).sum(dim=1) + 1).cpu().numpy(),
        token_ids=token_ids[:, :count].cpu().numpy(),
        values=(values - normalizer)[:, :count].cpu().numpy(),
    )
    return PendingLogprobs(logprobs)


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `[M, V]` and their columns, largest first.

    The k largest elements lie in the k blocks of largest maximum, so two small selections replace a large one.
    """
    num_rows, size = logits.shape
    num_blocks = size // BLOCK
    if count * 2 >= num_blocks:
        return _largest(logits, count)
    whole = num_blocks * BLOCK
    blocks = logits[:, :whole].unflatten(1, (num_blocks, BLOCK))
    chosen = torch.topk(blocks.amax(dim=2), count, dim=1, sorted=False).indices
    columns = (chosen.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    if whole == size and logits.is_contiguous():
        flat = chosen + torch.arange(num_rows, device=logits.device).unsqueeze(1) * num_blocks
        elements = logits.view(-1, BLOCK).index_select(0, flat.flatten()).view(num_rows, -1)
    else:
        tail = torch.arange(whole, size, device=logits.device).expand(num_rows, -1)
        columns = torch.cat([columns, tail], dim=1)
        elements = logits.gather(1, columns)
    values, places = _largest(elements, count)
    return values, columns.gather(1, places)


def _largest(elements: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`, on a CPU by way of numpy's partition, which is several times faster there."""
    if elements.device.type != "cpu" or count == elements.shape[1]:
        return torch.topk(elements, count, dim=1)
    places = np.argpartition(elements.numpy(), elements.shape[1] - count, axis=1)[:, -count:]
    found = torch.from_numpy(places)
    values, order = elements.gather(1, found).sort(dim=1, descending=True)
    return values, found.gather(1, order)


def _apply_edits(rows: Tensor, edits: LogitsEdits) -> None:
    def device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(rows.device)

    if len(edits.bias_rows):
        rows.index_put_(
            (device(edits.bias_rows), device(edits.bias_tokens)), device(edits.bias_offsets), accumulate=True
        )
    if len(edits.penalty_rows):
        where = (device(edits.penalty_rows), device(edits.penalty_tokens))
        values = rows[where]
        factor = device(edits.repetition)
        values = torch.where(values > 0, values / factor, values * factor)
        rows[where] = values - device(edits.reduction)


def _choose(rows: Tensor, inputs: SamplingInputs) -> tuple[np.ndarray, set[int]]:
    """Token ids `[R]` and the samples without a valid distribution."""
    is_random = inputs.temperature > 0
    if rows.device.type == "cpu":
        array = rows.numpy()
        token_ids = array.argmax(axis=1)  # numpy's is several times faster than torch's on a CPU, and finds NaN too
        best = array[np.arange(len(array)), token_ids]
    else:
        best_tensor, index = rows.max(dim=1)
        token_ids, best = index.cpu().numpy(), best_tensor.cpu().numpy()
    failed = set(np.flatnonzero(~np.isfinite(best)).tolist())
    if is_random.any():
        is_random[list(failed)] = False
        for draw, members in _groups(inputs, is_random):
            token_ids[members] = draw(_take(rows, members), _Parameters(inputs, members, best, rows.device))
    return token_ids, failed


def _groups(inputs: SamplingInputs, is_random: np.ndarray) -> list[tuple[Draw, np.ndarray]]:
    by_k = is_random & (inputs.top_k > 0)
    narrow = by_k & (inputs.top_k <= CANDIDATES)
    nucleus = is_random & ~by_k & (inputs.top_p < 1)
    wide = by_k & ~narrow
    opened = is_random & ~by_k & ~nucleus
    draws = ((_draw_narrow, narrow), (_draw_nucleus, nucleus), (_draw_wide, wide), (_draw_open, opened))
    return [(draw, np.flatnonzero(members)) for draw, members in draws if members.any()]


class _Parameters:
    """Columns `[M, 1]` of parameters on the logits' device."""

    def __init__(self, inputs: SamplingInputs, members: np.ndarray, best: np.ndarray, device: torch.device) -> None:
        def column(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array[members]).to(device).unsqueeze(1)

        self.best = column(best)
        self.temperature = column(inputs.temperature)
        self.top_k = column(inputs.top_k)
        self.top_p = column(inputs.top_p)
        self.min_p = column(inputs.min_p)
        self.noise = column(inputs.noise)
        self.has_min_p = bool((inputs.min_p[members] > 0).any())

    def take(self, members: Tensor) -> _Parameters:
        taken = object.__new__(_Parameters)
        for name, value in vars(self).items():
            setattr(taken, name, value[members] if isinstance(value, Tensor) else value)
        return taken

    def weights(self, logits: Tensor) -> Tensor:
        """Unnormalised probabilities of logits `[M, K]`: the row's largest is 1, so nothing overflows; below min_p,
        0."""
        weights = logits.sub(self.best).div_(self.temperature)
        if weights.device.type == "cpu":
            np.exp(weights.numpy(), out=weights.numpy())  # twice as fast as torch's
        else:
            weights.exp_()
        return weights.masked_fill_(weights < self.min_p, 0.0) if self.has_min_p else weights


Draw = Callable[[Tensor, _Parameters], np.ndarray]


def _draw_narrow(logits: Tensor, parameters: _Parameters) -> np.ndarray:
    """top_k within the candidates, after min_p and before top_p."""
    values, columns = top_candidates(logits, min(CANDIDATES, logits.shape[1]))
    return _draw_sorted(parameters.weights(values), columns, parameters, None)


def _draw_nucleus(logits: Tensor, parameters: _Parameters) -> np.ndarray:
    """top_p without top_k: among ever more candidates, until they hold the nucleus."""
    weights = parameters.weights(logits)
    mass = weights.sum(dim=1, keepdim=True, dtype=torch.float64)
    token_ids = np.empty(len(weights), np.int64)
    rows = torch.arange(len(weights), device=weights.device)
    for count in (CANDIDATES, 16 * CANDIDATES, weights.shape[1]):
        count = min(count, weights.shape[1])
        values, columns = top_candidates(weights, count)
        token_ids[rows.cpu().numpy()] = _draw_sorted(values, columns, parameters, mass)
        outside = values.sum(dim=1, keepdim=True, dtype=torch.float64) < parameters.top_p * mass
        left = torch.nonzero(outside.squeeze(1)).squeeze(1)
        if len(left) == 0 or count == weights.shape[1]:
            break
        rows, weights, mass, parameters = rows[left], weights[left], mass[left], parameters.take(left)
    return token_ids


def _draw_wide(logits: Tensor, parameters: _Parameters) -> np.ndarray:
    values, columns = torch.sort(logits, dim=1, descending=True, stable=True)
    return _draw_sorted(parameters.weights(values), columns, parameters, None)


def _draw_sorted(weights: Tensor, columns: Tensor, parameters: _Parameters, mass: Tensor | None) -> np.ndarray:
    """Draws from weights `[M, K]`, largest first. `mass`: of the whole distribution, if it reaches beyond the K."""
    weights = weights.double()
    places = torch.arange(weights.shape[1], device=weights.device)
    weights.masked_fill_((parameters.top_k > 0) & (places >= parameters.top_k), 0.0)
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:] if mass is None else mass
    # A token stays while the mass before it is less than top_p: the one that crosses the line stays too.
    weights.masked_fill_(cumulative - weights >= parameters.top_p * total, 0.0)
    return columns.gather(1, _invert(weights, parameters.noise)).squeeze(1).cpu().numpy()


def _draw_open(logits: Tensor, parameters: _Parameters) -> np.ndarray:
    """Two steps down a tree: a block by its mass, then a token of the block."""
    weights = parameters.weights(logits)
    size = weights.shape[1]
    if size % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - size % BLOCK))
    blocks = weights.unflatten(1, (-1, BLOCK))
    masses = blocks.sum(dim=2).double()
    block = _invert(masses, parameters.noise)
    below = masses.cumsum(dim=1).gather(1, block) - masses.gather(1, block)
    within = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).double()
    rest = (parameters.noise * masses.sum(dim=1, keepdim=True) - below) / within.sum(dim=1, keepdim=True)
    place = _invert(within, rest.clamp_(0.0, 1.0))
    return (block * BLOCK + place).squeeze(1).cpu().numpy()


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """`[M, 1]`, the first place whose cumulative weight passes noise · total, never one of weight 0."""
    cumulative = weights.cumsum(dim=1)
    target = noise * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding may carry the target to the very end, where weights may be 0: step back to the last real one.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(place, last)


def _take(rows: Tensor, members: np.ndarray) -> Tensor:
    return rows.index_select(0, torch.from_numpy(members).to(rows.device))
