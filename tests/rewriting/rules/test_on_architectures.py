"""Every rule fires on a model of transformers that needs it, and the model says the same with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from tests.system.conftest import _quiet_torch  # noqa: F401  (a fixture)
from tests.system.paged import PagedDriver
from tests.system.test_architectures import prompts
from tests.system.tiny_models import load, make_checkpoint

from enginery.checkpoint import Checkpoint
from enginery.frontends.huggingface import import_checkpoint
from enginery.rewriting.pipeline import PipelineConfig, optional_rules, rule_names, run_phases

FIRES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "llama": (
        "CancelTransposes", "CommonSubexpressions", "DropCasts", "DropIdentities", "FuseAddNorm", "FuseRotary",
        "FuseSiluMul", "GatherEarlier", "MergeParallelLinears", "MergeReshapes", "PackLinears", "PageAttention",
        "SelectBeforeTranspose", "SinkTransposes", "TransposeOfUnsqueeze", "ViewToReshape",
    ),
    "llama_tied": ("PackTiedEmbedding", "MergeParallelLinears"),
    "phi3": ("FuseSiluMul",),
    "gemma": ("FuseAddNorm", "GatherInLastLayer", "ScalarsToNumbers", "ScaleBeforeLinear"),
    "granite": ("ScaleBeforeLinear", "ScaleIntoEmbedding", "ScaleIntoLinear"),
    "minicpm3": ("MergeFactors", "ScaleIntoEmbedding"),
    "opt": ("NormIntoLinear", "ScaleIntoAttention", "MergeParallelLinears"),
    "gpt_neox": ("NormIntoLinear",),
    "falcon": ("GroupRepeatedHeads", "LinearFromMatmul", "PermuteToTranspose", "RecogniseAttention"),
    "falcon_alibi": ("BiasIntoLinear", "MergeParallelLinears", "RecogniseAttention"),
    "bloom": ("ExpandBaddbmm", "RecogniseAttention"),
    "gpt2": ("DropViews", "LinearFromMatmul"),
    "mpt": ("DropCopies", "RecogniseAttention"),
})  # fmt: skip
"""Of the rules that fire on an architecture, those that it is the example of."""

NOWHERE = {"CancelUnsqueeze", "DeadCode", "FuseGate", "FuseNormLinear", "QuantiseLinears", "SkinnyLinears"}
"""two that tidy up what other frontends and rules of a user's own leave; one that is approximate; those of GPUs, which
test_fused_linears.py runs"""


def logits(directory: Path, rules: tuple[str, ...]) -> tuple[torch.Tensor, Counter[str]]:
    """Logits of a prompt in two chunks with these optional rules switched on, and how often each rule applied."""
    checkpoint = Checkpoint.open(directory)
    network = import_checkpoint(checkpoint, dtype=torch.float32).network
    known = optional_rules()
    report = run_phases(network, PipelineConfig(rules=tuple(known[name]() for name in rules)))
    network.verify()
    driver = PagedDriver(network, checkpoint)
    first, _ = prompts()
    rows = [driver.step({"first": chunk})["first"] for chunk in (first[:9], first[9:])]
    return torch.cat(rows), Counter(report.counts)


@pytest.mark.parametrize("name", FIRES)
def test_rules_that_fire(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path)
    rules = tuple(rule for rule in FIRES[name] if rule in optional_rules())
    found, counts = logits(directory, rules)
    assert [rule for rule in FIRES[name] if not counts[rule]] == []
    with torch.no_grad():
        expected = load(directory, torch.float32)(input_ids=torch.tensor([prompts()[0]])).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_no_rule_is_forgotten() -> None:
    shown = {rule for rules in FIRES.values() for rule in rules}
    assert set(rule_names()) - shown <= NOWHERE
