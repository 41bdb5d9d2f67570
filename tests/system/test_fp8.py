"""Decoders of transformers in 8-bit floats, beside the same network in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.system.paged import PagedDriver
from tests.system.test_architectures import prefill
from tests.system.tiny_models import make_checkpoint

from enginery.checkpoint import Checkpoint
from enginery.frontends.huggingface import import_checkpoint
from enginery.rewriting.pipeline import PipelineConfig, run_phases
from enginery.rewriting.rules.quantise_linears import QuantiseLinears

DENSE, EXPERTS = 0.08, 0.3
"""Shares of the logits' norm. 0.025 to 0.040 is found; where experts are, another may be chosen."""


def logits(directory: Path, *rules: QuantiseLinears) -> tuple[torch.Tensor, int]:
    checkpoint = Checkpoint.open(directory)
    network = import_checkpoint(checkpoint, dtype=torch.bfloat16).network
    report = run_phases(network, PipelineConfig(rules=rules))
    network.verify()
    first, second = prefill(PagedDriver(network, checkpoint))
    return torch.cat([first, second]), report.counts.get("QuantiseLinears", 0)


@pytest.mark.parametrize(
    ("name", "quantised", "limit"),
    [
        ("llama_tied", 8, DENSE), ("gpt2", 8, DENSE), ("gemma2", 8, DENSE), ("falcon", 8, DENSE),
        ("mixtral", 4, EXPERTS), ("deepseek_v3", 9, EXPERTS),
    ],
)  # fmt: skip
def test_logits(name: str, quantised: int, limit: float, tmp_path: Path) -> None:
    """Query, key and value are one linear, as are gate and up; experts stay as they are."""
    directory = make_checkpoint(name, tmp_path)
    found, count = logits(directory, QuantiseLinears())
    expected, none = logits(directory)
    assert (count, none) == (quantised, 0)
    assert 0 < (found - expected).norm() / expected.norm() < limit
