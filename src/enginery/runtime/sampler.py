"""Logits to tokens, for a whole batch at once, each row by its own parameters.

Which token a row gives depends on that row alone: its logits, its parameters and its noise, which is a function of
(seed, completion, position). A random row is drawn by inverting the cumulative distribution at one uniform number, so
a seeded request gives the same tokens in any batch. Rows are grouped by how much of the vocabulary must be looked at:

- greedy: the largest logit;
- ranked (top_k): the k most likely tokens, but 128 where k is smaller;
- nucleus (top_p alone): the probabilities of all tokens, to find the least that is kept;
- open (temperature and min_p only): no order is needed; the noise picks a block of the vocabulary by its mass, then a
  token in it.

The host decides by the parameters alone, never by what the device computes, so that it can go on while the device
works: parameters go there in one copy, and only `Sampling.wait` waits for what comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enginery.runtime.batch import SamplingInputs
from enginery.runtime.draws import CANDIDATES, Draws, HostDraws, Parameters
from enginery.runtime.logprobs import TopLogprobs, logprob_tensors
from enginery.runtime.transfers import Arrays, Download, Tensors, upload


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

    def __init__(self, token_ids: Tensor, best: Tensor, logprobs: list[Tensor], wanted: np.ndarray) -> None:
        self.token_ids = token_ids
        """`[R]` int64 on the device of the logits, valid there in the order of its stream."""
        self._download = Download([token_ids, best, *logprobs])
        self._wanted = wanted

    def wait(self) -> Samples:
        """Blocks until the outcome is on the host."""
        token_ids, best, *logprobs = self._download.wait()
        return Samples(
            token_ids=token_ids.tolist(),
            failed=set(np.flatnonzero(~np.isfinite(best)).tolist()),
            logprobs=TopLogprobs(*logprobs) if logprobs else None,
            logprobs_row={sample: row for row, sample in enumerate(self._wanted.tolist())},
        )


class Sampler:
    """Stateless. May write to the logits it is given."""

    def __init__(self, draws: Draws | None = None) -> None:
        """`draws`: how to, where not the device of the logits is to decide."""
        self._draws = draws

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Sampling:
        """Draws one token per entry of `inputs` from logits `[L, vocab_size]`. Does not wait for the device."""
        draws = self._draws or (HostDraws() if logits.device.type == "cpu" else Draws())
        groups = _groups(inputs, draws, logits.shape[1])
        wanted = np.flatnonzero(inputs.num_logprobs >= 0)
        sets = [_shared_arrays(inputs, wanted), *(group.arrays(inputs) for group in groups)]
        arrays, *columns = upload(sets, logits.device)
        rows = logits if inputs.rows is None else logits.index_select(0, arrays["rows"])
        raw = rows
        if groups or inputs.edits is not None:
            rows = rows.to(torch.float32, copy=len(wanted) > 0)
        if inputs.edits is not None:
            rows = rows.contiguous()
            _apply_edits(rows, arrays, inputs.edits.num_pending, _newest(inputs, arrays))
        best, token_ids = draws.greatest(rows)
        for group, own in zip(groups, columns, strict=True):
            token_ids = group.draw(rows, best, token_ids, own)
        logprobs: list[Tensor] = []
        if len(wanted):
            raw, chosen = _take(raw, arrays, "wanted").float(), _take(token_ids, arrays, "wanted")
            logprobs = logprob_tensors(raw, chosen, int(inputs.num_logprobs.max()))
        return Sampling(token_ids, best, logprobs, wanted)


@dataclass(slots=True)
class _Group:
    """Random rows that are drawn alike."""

    draw_from: Callable[[Tensor, Parameters], Tensor]
    members: np.ndarray
    most: int
    """No smaller than any member's top_k."""

    def arrays(self, inputs: SamplingInputs) -> Arrays:
        """What its draw needs to know, by name."""
        arrays = {name: getattr(inputs, name)[self.members] for name in ("temperature", "top_k", "top_p", "noise")}
        min_p = inputs.min_p[self.members]
        if min_p.any():
            arrays["min_p"] = min_p.astype(np.float32)
        if len(self.members) < len(inputs.temperature):
            arrays["members"] = self.members
        return arrays

    def draw(self, rows: Tensor, best: Tensor, token_ids: Tensor, arrays: Tensors) -> Tensor:
        """`token_ids` `[R]` with those of the members drawn."""
        columns = {name: array.unsqueeze(1) for name, array in arrays.items() if name != "members"}
        parameters = Parameters(
            best=_take(best, arrays, "members").unsqueeze(1),
            temperature=columns["temperature"],
            top_k=columns["top_k"],
            top_p=columns["top_p"],
            noise=columns["noise"],
            min_p=columns.get("min_p"),
            most=self.most,
        )
        drawn = self.draw_from(_take(rows, arrays, "members"), parameters)
        return token_ids.index_copy_(0, arrays["members"], drawn) if "members" in arrays else drawn


def _groups(inputs: SamplingInputs, draws: Draws, vocab_size: int) -> list[_Group]:
    is_random = inputs.temperature > 0
    if not is_random.any():
        return []
    by_k = is_random & (inputs.top_k > 0)
    narrow = by_k & (inputs.top_k <= CANDIDATES)
    nucleus = is_random & ~by_k & (inputs.top_p < 1)
    kinds = (
        (draws.ranked, narrow),
        (draws.ranked, by_k & ~narrow),
        (draws.nucleus, nucleus),
        (draws.open, is_random & ~by_k & ~nucleus),
    )
    size = draws.max_rows(vocab_size)
    groups = []
    for draw, chosen in kinds:
        members = np.flatnonzero(chosen)
        for part in (members[first : first + size] for first in range(0, len(members), size)):
            groups.append(_Group(draw, part, max(CANDIDATES, int(inputs.top_k[part].max()))))
    return groups


def _shared_arrays(inputs: SamplingInputs, wanted: np.ndarray) -> Arrays:
    """What the device must know besides the groups' own, by name."""
    arrays: Arrays = {} if inputs.rows is None else {"rows": inputs.rows}
    if 0 < len(wanted) < len(inputs.temperature):
        arrays["wanted"] = wanted
    if inputs.edits is not None:
        arrays |= inputs.edits.arrays()
        if inputs.pending is not None:
            arrays["places"] = inputs.pending[1]
    return arrays


def _newest(inputs: SamplingInputs, arrays: Tensors) -> Tensor | None:
    """`[R]`, the pending token of each sample, -1 where there is none; None if there is nowhere one."""
    if inputs.pending is None or (inputs.pending[1] < 0).all():
        return None
    places = arrays["places"]
    return inputs.pending[0].index_select(0, places.clamp(min=0)).masked_fill_(places < 0, -1)


def _apply_edits(logits: Tensor, arrays: Tensors, num_pending: int, newest: Tensor | None) -> None:
    """Edits contiguous logits `[R, V]` in place by `LogitsEdits.arrays` on their device.

    `newest`: `[R]` int64, the pending token of each row, -1 where there is none; None: nowhere.
    """
    flat = logits.view(-1)
    if "bias_rows" in arrays:
        rows, offsets = arrays["bias_rows"], arrays["bias_offsets"]
        if newest is not None:
            required = arrays["bias_required"]
            offsets = offsets.masked_fill((required >= 0) & (required != newest[rows]), 0.0)
        flat.scatter_add_(0, rows * logits.shape[1] + arrays["bias_tokens"], offsets)
    if "penalty_rows" in arrays:
        rows, tokens, counts = arrays["penalty_rows"], arrays["penalty_tokens"], arrays["counts"]
        if newest is not None:
            mine = newest[rows]
            tokens = torch.where(tokens < 0, mine, tokens)
            counts = counts + (tokens == mine)
        where = rows * logits.shape[1] + tokens
        values = flat.gather(0, where)
        values = torch.where(values > 0, values / arrays["repetition"], values * arrays["repetition"])
        values -= arrays["frequency"] * counts + arrays["presence"] * (counts > 0)
        for part in (slice(num_pending), slice(num_pending, None)):
            flat.scatter_(0, where[part], values[part])


def _take(rows: Tensor, arrays: Tensors, name: str) -> Tensor:
    """The rows of that name, or all where there is none."""
    return rows.index_select(0, arrays[name]) if name in arrays else rows
