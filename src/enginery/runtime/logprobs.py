"""Logprobs of the chosen and of the most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from enginery.runtime.candidates import top_candidates
from enginery.runtime.transfers import Download, upload


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
