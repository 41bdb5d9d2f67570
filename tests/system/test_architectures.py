"""Any Hugging Face decoder: imported, rewritten and run over a paged cache, it says what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.system.paged import PagedDriver
from tests.system.tiny_models import CONFIGS, VOCABULARY, load, make_checkpoint

from enginery.checkpoint import Checkpoint
from enginery.frontends.huggingface import import_checkpoint
from enginery.rewriting.pipeline import run_phases

STEPS = 64


def prompts() -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (21, 13))
    return first, second


def rewritten(directory: Path, dtype: torch.dtype) -> PagedDriver:
    checkpoint = Checkpoint.open(directory)
    network = import_checkpoint(checkpoint, dtype=dtype).network
    network.verify()
    run_phases(network)
    network.verify()
    return PagedDriver(network, checkpoint)


def prefill(driver: PagedDriver) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both prompts: the first in two chunks, the second in one step with the first one's rest."""
    first, second = prompts()
    head = driver.step({"first": first[:9]})
    rest = driver.step({"first": first[9:], "second": second})
    return torch.cat([head["first"], rest["first"]]), rest["second"]


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_tokens_and_logits(name: str, tmp_path: Path) -> None:
    first, second = prompts()
    directory = make_checkpoint(name, tmp_path)
    driver = rewritten(directory, torch.float32)
    model = load(directory, torch.float32)
    logits, other = prefill(driver)
    rows, tokens = [logits], [int(logits[-1].argmax())]
    while len(tokens) < STEPS:
        rows.append(driver.step({"first": tokens[-1:]})["first"])
        tokens.append(int(rows[-1][-1].argmax()))
    with torch.no_grad():
        generated = model.generate(torch.tensor([first]), max_new_tokens=STEPS, do_sample=False)[0].tolist()
        expected = model(input_ids=torch.tensor([first + tokens[:-1]])).logits[0]
        expected_other = model(input_ids=torch.tensor([second])).logits[0]
    assert tokens == generated[len(first) :]
    assert (torch.cat(rows) - expected).abs().max() < 1e-4
    assert (other - expected_other).abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_as_exact_as_transformers(name: str, tmp_path: Path) -> None:
    first, second = prompts()
    directory = make_checkpoint(name, tmp_path)
    ours = torch.cat(prefill(rewritten(directory, torch.bfloat16)))
    with torch.no_grad():
        exact, theirs = (
            torch.cat([model(input_ids=torch.tensor([ids])).logits[0].float() for ids in (first, second)])
            for model in (load(directory, torch.float32), load(directory, torch.bfloat16))
        )
    error, reference = (ours - exact).norm(), (theirs - exact).norm()
    assert error <= 1.5 * reference, f"{error:.4f} against {reference:.4f}"
