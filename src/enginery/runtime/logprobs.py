"""Logprobs of the chosen and of the most likely tokens, and the search for those."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enginery.runtime.transfers import Download, upload

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


class PendingLogprobs:
    """Logprobs that are being computed."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._download = Download(tensors)

    def wait(self) -> TopLogprobs:
        """Blocks until they are on the host."""
        return TopLogprobs(*self._download.wait())


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> PendingLogprobs:
    """Of logits `[M, V]` and chosen token ids `[M]`, on the host or beside the logits: see `TopLogprobs`, with
    K = `count`. Does not wait for the device."""
    if chosen.device != logits.device:
        chosen = upload([{"chosen": chosen.numpy()}], logits.device)[0]["chosen"]
    return PendingLogprobs(logprob_tensors(logits, chosen, count))


def logprob_tensors(logits: Tensor, chosen: Tensor, count: int) -> list[Tensor]:
    """The fields of `TopLogprobs`, in order, on the device of the logits."""
    chosen = chosen.unsqueeze(1)
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen_logits = logits.gather(1, chosen)
    # One column at least, so that the shapes below hold for count = 0.
    values, token_ids = top_candidates(logits, max(1, min(count, logits.shape[1])))
    return [
        (chosen_logits - normalizer).squeeze(1),
        (logits > chosen_logits).sum(dim=1) + 1,
        token_ids[:, :count],
        (values - normalizer)[:, :count],
    ]


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `[M, V]` and their columns, largest first, equal ones by column.

    The k largest elements lie in the k blocks of largest maximum, so two small selections replace a large one.
    """
    num_rows, size = logits.shape
    num_blocks = size // BLOCK
    if count * 2 >= num_blocks:
        return _largest(logits, count)
    whole = num_blocks * BLOCK
    blocks = logits[:, :whole].unflatten(1, (num_blocks, BLOCK))
    chosen = torch.topk(blocks.amax(dim=2), count, dim=1, sorted=False).indices.sort(dim=1).values
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
    """`torch.topk` with equal elements in order of their places, whose own order is anyone's guess."""
    if count == elements.shape[1]:
        return elements.sort(dim=1, descending=True, stable=True)
    if elements.device.type == "cpu":
        # Several times faster than torch's selection on a CPU.
        found = torch.from_numpy(np.argpartition(elements.numpy(), elements.shape[1] - count, axis=1)[:, -count:])
    else:
        found = torch.topk(elements, count, dim=1, sorted=False).indices
    found = found.sort(dim=1).values
    values, order = elements.gather(1, found).sort(dim=1, descending=True, stable=True)
    return values, found.gather(1, order)
