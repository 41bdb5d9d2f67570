"""Names and bytes: what lies in a model directory, read with bounds and mapped without copies."""

from __future__ import annotations

from enginery.checkpoint.checkpoint import Checkpoint
from enginery.checkpoint.safetensors_file import TensorInfo
from enginery.checkpoint.tokenizer import Tokenizer

__all__ = ["Checkpoint", "TensorInfo", "Tokenizer"]
