"""The bundled model, and `training/` on the import path: its tasks are the yardstick."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))


@pytest.fixture(scope="session")
def directory() -> Path:
    return ROOT / "src" / "enginery" / "models" / "enginery-6m"


@pytest.fixture(scope="session")
def bundled(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True)
