"""The arrays of a step on a GPU: side by side in one buffer, sent there by one copy that the host does not wait for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from enginery.engine.protocol import EngineLimits, StepInputs

ALIGNMENT = 256
"""bytes; compiled code expects its inputs as aligned as the allocator makes them"""
RING = 3
"""host buffers: one is being filled while those of the step that runs and of the one behind it are copied"""

Views = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's arrays; those of a padded one are larger than the batch."""

    tokens: int
    sequences: int
    blocks: int
    """columns of the block tables"""
    logits: int

    @classmethod
    def of(cls, inputs: StepInputs) -> StepShape:
        sequences, blocks = inputs.block_tables.shape
        return cls(len(inputs.token_ids), sequences, blocks, max(1, len(inputs.logits_indices)))

    @property
    def is_decode(self) -> bool:
        """One new token for each sequence: attention writes its cache itself."""
        return self.tokens == self.sequences


@dataclass(frozen=True)
class Field:
    """One array: where it lies in the buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: type
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class InputBuffer:
    """Memory for the inputs of steps on a GPU.

    The buffer begins with what the last step sampled, followed by the token ids that the host knows. `tokens` says for
    each token where in the two it is, so that one gather brings them together. Padding tokens belong to no sequence,
    padding sequences own no token.
    """

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        self._limits = limits
        self._num_sampled = -(-limits.max_num_seqs // 32) * 32
        longest = -(-limits.max_model_len // limits.block_size) + 1
        rows = limits.max_num_tokens
        largest = StepShape(rows, max(limits.max_num_seqs, 1), longest, max(rows, limits.max_num_seqs))
        size = max(field.end for field in self._fields(largest)) + ALIGNMENT
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(RING)]
        self._sent = [torch.cuda.Event() if pinned else None for _ in range(RING)]
        self._turn = 0

    def send(self, inputs: StepInputs, shape: StepShape) -> None:
        """Copies the arrays, padded to `shape`; `views(shape)` are valid until the next call, in stream order."""
        self._turn = (self._turn + 1) % RING
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        host = self._host[self._turn]
        fields = list(self._fields(shape))
        arrays = {field.name: _array(host.numpy(), field) for field in fields}
        self._fill(arrays, inputs, shape)
        first, end = fields[0].offset, max(field.end for field in fields)
        self._device[first:end].copy_(host[first:end], non_blocking=True)
        if inputs.sampled is not None:
            self._sampled[: len(inputs.sampled)].copy_(inputs.sampled, non_blocking=True)
        if sent is not None:
            sent.record()

    def views(self, shape: StepShape) -> Views:
        """The arrays of a step of this shape on the device, by the names of `StepInputs`; `tokens` and `known` give
        `token_ids` by `gathered`."""
        views = {field.name: self._view(field) for field in self._fields(shape)}
        views["known"] = self._device[: self._num_sampled * 8 + shape.tokens * 8].view(torch.int64)
        return views

    @property
    def _sampled(self) -> torch.Tensor:
        return self._device[: self._num_sampled * 8].view(torch.int64)

    def _view(self, field: Field) -> torch.Tensor:
        dtype = torch.int64 if field.dtype is np.int64 else torch.int32
        return self._device[field.offset : field.end].view(dtype).view(field.shape)

    def _fields(self, shape: StepShape) -> Iterator[Field]:
        """In the order of the buffer. Token ids come first, behind the samples."""
        offset = self._num_sampled * 8
        tokens, sequences = shape.tokens, shape.sequences
        for name, sizes, dtype in (
            ("token_ids", (tokens,), np.int64),
            ("tokens", (tokens,), np.int64),
            ("positions", (tokens,), np.int64),
            ("slot_mapping", (tokens,), np.int64),
            ("logits_indices", (shape.logits,), np.int64),
            ("query_start", (sequences + 1,), np.int32),
            ("seq_lens", (sequences,), np.int32),
            ("block_tables", (sequences, shape.blocks), np.int32),
        ):
            field = Field(name, sizes, dtype, offset)
            yield field
            offset = -(-field.end // ALIGNMENT) * ALIGNMENT

    def _fill(self, arrays: dict[str, np.ndarray], inputs: StepInputs, shape: StepShape) -> None:
        count, sequences = len(inputs.token_ids), len(inputs.seq_lens)
        for name, padding in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1)):
            arrays[name][:count] = getattr(inputs, name)
            arrays[name][count:] = padding
        places = arrays["tokens"]
        places[:] = np.arange(self._num_sampled, self._num_sampled + shape.tokens)
        if inputs.sources is not None:
            pending = inputs.sources >= 0
            places[:count][pending] = inputs.sources[pending]
        wanted = len(inputs.logits_indices)
        arrays["logits_indices"][:wanted] = inputs.logits_indices
        # Compiled code wants at least one row: where no logits are wanted, the last token's are computed and dropped.
        arrays["logits_indices"][wanted:] = count - 1
        arrays["query_start"][: sequences + 1] = inputs.query_start
        arrays["query_start"][sequences + 1 :] = count
        arrays["seq_lens"][:sequences] = inputs.seq_lens
        arrays["seq_lens"][sequences:] = 0
        tables = arrays["block_tables"]
        width = inputs.block_tables.shape[1]
        tables[:sequences, :width] = inputs.block_tables
        tables[:sequences, width:] = 0
        tables[sequences:] = 0


def gathered(views: Views) -> Views:
    """The inputs of the network: every token id in its place."""
    values = {name: value for name, value in views.items() if name not in ("known", "tokens")}
    values["token_ids"] = views["known"].index_select(0, views["tokens"])
    return values


def _array(host: np.ndarray, field: Field) -> np.ndarray:
    return host[field.offset : field.end].view(field.dtype).reshape(field.shape)


__all__ = ["InputBuffer", "StepShape", "Views", "gathered"]
