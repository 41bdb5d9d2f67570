"""Checkpoints that are nowhere: the weights of a stated shape, drawn when they are read."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from enginery.checkpoint.checkpoint import Checkpoint
from enginery.checkpoint.safetensors_file import TensorInfo
from models import llama_tensors

DEVIATION = 0.02
"""of every matrix, as Llama is initialised: logits of a random model then have a deviation near 1"""


class RandomCheckpoint(Checkpoint):
    """Normal weights of deviation 0.02 and norms of 1, on `device`. A tensor's seed is its name's, so that every engine
    that reads the checkpoint has the same weights. 16 GB take about a second on a GPU."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: str) -> None:
        self._dtype = dtype
        self._device = device
        tensors = {
            name: TensorInfo(name, shape, dtype, Path("random"), 0, dtype.itemsize * torch.Size(shape).numel())
            for name, shape in llama_tensors(dict(config)).items()
        }
        super().__init__(Path("random"), {**config, "dtype": str(dtype).removeprefix("torch.")}, tensors)

    def read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self.tensors[name].shape, dtype=self._dtype, device=self._device)
        if tensor.ndim == 1:
            return tensor.fill_(1.0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(0.0, DEVIATION, generator=generator)
