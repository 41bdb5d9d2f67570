"""Beam search beside transformers' on a tiny random Llama, in memories and budgets of all sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from enginery.runtime.sampling_params import BeamSearchParams

from .harness import make_session, run_to_end

VOCABULARY = 31


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.6, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    return LlamaForCausalLM(config).eval()


def logits_of(model: LlamaForCausalLM):
    @torch.no_grad()
    def compute(contexts: list[list[int]]) -> torch.Tensor:
        return torch.stack([model(torch.tensor([context])).logits[0, -1].float() for context in contexts])

    return compute


def until_end(token_ids: list[int], eos: list[int]) -> list[int]:
    """Without the padding after the first end of sequence."""
    ends = [place for place, token_id in enumerate(token_ids) if token_id in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [2, 3, 5])
def test_hypotheses_are_those_of_transformers(
    model: LlamaForCausalLM, width: int, length_penalty: float, early_stopping: bool | str
) -> None:
    prompt = torch.randint(3, VOCABULARY, (5,)).tolist()
    eos = torch.randint(3, VOCABULARY, (2,)).tolist()
    expected = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 5, dtype=torch.long), num_beams=width, do_sample=False,
        num_return_sequences=width, max_new_tokens=12, length_penalty=length_penalty, early_stopping=early_stopping,
        eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    session = make_session(
        vocab_size=VOCABULARY, logits_of=logits_of(model), max_num_tokens=3, eos_token_ids=tuple(eos)
    )
    params = BeamSearchParams(width, 12, length_penalty=length_penalty, early_stopping=early_stopping)
    session.add(prompt, params)
    output = run_to_end(session)["request-0"]
    found = [completion.token_ids for completion in output.outputs]
    assert found == [until_end(row[5:].tolist(), eos) for row in expected.sequences]
    scores = [c.cumulative_logprob / len(c.token_ids) ** length_penalty for c in output.outputs]
    assert scores == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)


def test_memory_and_batch_do_not_change_the_search() -> None:
    prompts = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in (3, 9, 17, 6)]
    params = BeamSearchParams(4, 25, n=3)
    outputs = {}
    for blocks, seqs, tokens in ((400, 64, 512), (14, 64, 9), (400, 2, 512), (14, 3, 1)):
        session = make_session(num_blocks=blocks, max_num_seqs=seqs, max_num_tokens=tokens, vocab_size=VOCABULARY)
        for prompt in prompts:
            session.add(prompt, params)
        final = run_to_end(session)
        outputs[blocks, seqs] = [
            [(c.token_ids, c.cumulative_logprob) for c in final[key].outputs] for key in sorted(final)
        ]
        if blocks == 14:
            assert session.stats().num_preemptions > 0
    reference = outputs[400, 64]
    assert all(len(hypotheses) == 3 for hypotheses in reference)
    assert all(found == reference for found in outputs.values())


def test_cancelled_beams_free_their_memory() -> None:
    session = make_session()
    request_id = session.add([1, 2, 3], BeamSearchParams(4, 30))
    for _ in range(5):
        session.step()
    assert session.cancel(request_id)
    assert session.scheduler.blocks.num_used == 0
    assert run_to_end(session)[request_id].outputs[0].finish_reason == "abort"
