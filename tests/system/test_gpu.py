"""On an NVIDIA GPU: what transformers says on that device, and a crowd of requests that says what each says alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.test_scheduling import random_params
from tests.system.tiny_models import VOCABULARY, load, make_checkpoint

from enginery.engine.engine import Engine
from enginery.engine.protocol import StepInputs
from enginery.llm import build
from enginery.runtime.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from enginery.runtime.session import Session, SessionConfig

pytestmark = pytest.mark.gpu

STEPS = 32
COUNT = 1000
NAMES = ("llama", "mistral", "gemma2", "qwen3", "gpt2")
"""grouped heads, a window, soft caps, normed queries, learned positions"""
EAGER = {"attn_implementation": "eager"}
"""transformers' SDPA knows no soft caps"""
SMALL = {"device": "cuda", "kv_cache_memory": 8 << 20, "max_num_batched_tokens": 256, "max_num_seqs": 40}


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def prompt(size: int = 21) -> list[int]:
    return torch.randint(3, VOCABULARY, (size,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize(("name", "backend"), [("llama", "eager"), *((name, "compiled") for name in NAMES)])
def test_float32_tokens_equal_those_of_transformers(name: str, backend: str, tmp_path: Path, cache: None) -> None:
    directory = make_checkpoint(name, tmp_path)
    engine = build(directory, output=tmp_path / "engine", dtype="float32", backend=backend, **SMALL)
    output = Session(engine).generate([prompt()], SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True))
    model = load(directory, torch.float32, **EAGER).cuda()
    ids = torch.tensor([prompt()], device="cuda")
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)[0].tolist()
    assert output[0].outputs[0].token_ids == expected[len(prompt()) :]
    engine.close()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_exact_as_transformers(name: str, tmp_path: Path, cache: None) -> None:
    directory = make_checkpoint(name, tmp_path)
    engine = build(directory, output=tmp_path / "engine", dtype="bfloat16", backend="eager", **SMALL)
    ids = torch.tensor([prompt(60)])
    with torch.no_grad():
        exact = load(directory, torch.float32, **EAGER)(input_ids=ids).logits[0]
        theirs = load(directory, torch.bfloat16, **EAGER).cuda()(input_ids=ids.cuda()).logits[0].float().cpu()
    ours = engine.execute(whole_prompt(prompt(60))).cpu()
    error, reference = (ours - exact).norm(), (theirs - exact).norm()
    engine.close()
    assert error <= 1.5 * reference, f"{error:.4f} against {reference:.4f}"


def whole_prompt(tokens: list[int]) -> StepInputs:
    """One step, with the logits of every token."""
    places = np.arange(len(tokens))
    return StepInputs(
        token_ids=np.array(tokens),
        positions=places,
        slot_mapping=places,
        block_tables=np.arange(-(-len(tokens) // 16), dtype=np.int32)[None],
        query_start=np.array([0, len(tokens)], np.int32),
        seq_lens=np.array([len(tokens)], np.int32),
        logits_indices=places,
    )


def test_a_thousand_requests_in_a_small_memory_equal_each_alone(tmp_path: Path, cache: None) -> None:
    """Forks, beams, penalties, prefix hits and preemption, overlapped and replayed, against one request at a time."""
    directory = make_checkpoint("llama", tmp_path)
    block = 2 * 2 * 2 * 8 * 16 * 4
    settings = {**SMALL, "kv_cache_memory": 24 * block, "max_model_len": 96}
    engine = build(directory, output=tmp_path / "engine", dtype="float32", **settings)
    rng = random.Random(3)
    stems = [[rng.randrange(VOCABULARY) for _ in range(32)] for _ in range(3)]
    prompts = [rng.choice([*stems, []]) + rng.choices(range(VOCABULARY), k=rng.randint(1, 25)) for _ in range(COUNT)]
    params = [without_streams(random_params(rng)) for _ in prompts]
    crowd = Session(engine, config=SessionConfig(seed=1, eos_token_ids=(7,)))
    together = crowd.generate(prompts, params)
    assert crowd.stats().num_preemptions > COUNT / 20
    assert crowd.stats().num_prefix_hits > 32 * COUNT / 20
    wrong = []
    for tokens, wanted, output in zip(prompts, params, together, strict=True):
        alone = Session(engine, config=SessionConfig(seed=1, eos_token_ids=(7,), prefix_caching=False, overlap=False))
        (expected,) = alone.generate([tokens], wanted)
        if [c.token_ids for c in expected.outputs] != [c.token_ids for c in output.outputs]:
            wrong.append((tokens, wanted))
    engine.close()
    # A product's rounding depends on the size of the batch: a draw on the very edge between two tokens may fall over.
    assert len(wrong) <= 2, f"{len(wrong)} requests differ, {wrong[0]}"


def without_streams(params: SamplingParams | BeamSearchParams) -> SamplingParams | BeamSearchParams:
    if isinstance(params, BeamSearchParams):
        return params
    fields = {name: getattr(params, name) for name in params.__dataclass_fields__}
    return SamplingParams(**{**fields, "output_kind": RequestOutputKind.FINAL_ONLY})


def test_steps_go_on_behind_one_that_does_not_fit(tmp_path: Path, cache: None) -> None:
    """Out of memory in a step fails what cannot run; the engine answers afterwards."""
    directory = make_checkpoint("llama", tmp_path)
    engine: Engine = build(directory, output=tmp_path / "engine", dtype="float32", backend="eager", **SMALL)
    session = Session(engine)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    expected = session.generate([prompt()], greedy)[0].outputs[0].token_ids
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        failed = session.generate([prompt(200)], greedy)[0].outputs[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed.finish_reason in ("error", "length")
    session.reset_prefix_cache()
    assert session.generate([prompt()], greedy)[0].outputs[0].token_ids == expected
