"""The sampler beside plain per-row references, and beside the processors of transformers where they mean the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from enginery.runtime.batch import SamplingInputs, uniform_noise
from enginery.runtime.candidates import candidates_on_device, candidates_on_host
from enginery.runtime.draws import Draws, HostDraws, nucleus_floor
from enginery.runtime.edits import LogitsEdits
from enginery.runtime.logprobs import top_logprobs
from enginery.runtime.sampler import Sampler
from enginery.runtime.sampling_params import SamplingParams

from .harness import make_session


@pytest.fixture(params=[HostDraws, Draws])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """As on a CPU, and as on a device, whose tensors lie on the CPU here."""
    return Sampler(request.param())


def inputs(count: int, **columns) -> SamplingInputs:
    """R equal rows of parameters, except the columns given."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "noise": 0.5, "num_logprobs": -1}
    types = {"temperature": np.float32, "top_k": np.int64, "num_logprobs": np.int64}
    arrays = {
        name: np.broadcast_to(np.asarray(columns.get(name, default), types.get(name, np.float64)), (count,)).copy()
        for name, default in defaults.items()
    }
    return SamplingInputs(rows=columns.get("rows"), edits=columns.get("edits"), **arrays)


def probabilities(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution of one row, token by token, in float64."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < min_p] = 0
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        weights[order[top_k:]] = 0
    total, before = weights.sum(), 0.0
    for token in order:
        mass = weights[token]
        if before >= top_p * total:
            weights[token] = 0
        before += mass
    return weights / weights.sum()


SETTINGS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.7, "min_p": 0.0},
    {"temperature": 3.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.9, "min_p": 0.0},
    {"temperature": 2.0, "top_k": 300, "top_p": 1.0, "min_p": 0.001},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1e-6, "min_p": 0.0},
]


@pytest.mark.parametrize("vocab_size", [7, 64, 1000, 20011])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_distribution_is_the_reference(sampler: Sampler, setting: dict, vocab_size: int) -> None:
    """A fine grid of noise in place of random numbers turns the frequency of each token into its probability."""
    logits = torch.randn(vocab_size) * 2.5
    grid = 4000 if vocab_size <= 1000 else 1000
    if type(sampler._draws) is Draws and setting["top_p"] < 1 and not setting["top_k"]:
        grid = 320  # counts masses in half a megabyte a row, which takes its time on a CPU
    # In batches, as a batch mixes rows of all kinds of noise.
    drawn = Counter()
    for noise in np.array_split((np.arange(grid) + 0.5) / grid, 8):
        samples = sampler.sample(
            logits.expand(len(noise), -1).clone(), inputs(len(noise), noise=noise, **setting)
        ).wait()
        assert not samples.failed
        drawn.update(samples.token_ids)
    expected = probabilities(logits.numpy(), **setting)
    assert all(expected[token] > 0 for token in drawn), "a token outside the kept set was drawn"
    for token in np.argsort(-expected)[:50]:
        assert drawn[int(token)] / grid == pytest.approx(expected[token], abs=1.5 / grid)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(sampler: Sampler, setting: dict) -> None:
    rng = np.random.default_rng()
    logits = torch.randn(len(SETTINGS) * 3, 5003) * 3
    noise = rng.random(len(logits))
    mixed = {name: np.array([SETTINGS[row % len(SETTINGS)][name] for row in range(len(logits))]) for name in setting}
    together = sampler.sample(logits.clone(), inputs(len(logits), noise=noise, **mixed)).wait().token_ids
    for row in range(len(logits)):
        own = {name: column[row] for name, column in mixed.items()}
        assert sampler.sample(logits[row : row + 1].clone(), inputs(1, noise=noise[row], **own)).wait().token_ids == [
            together[row]
        ]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_device_draws_the_tokens_that_the_host_draws(setting: dict) -> None:
    logits = torch.randn(12, 4099) * 3
    batch = inputs(12, noise=np.random.default_rng().random(12), **setting)
    on_host, on_device = (Sampler(draws).sample(logits.clone(), batch).wait() for draws in (HostDraws(), Draws()))
    assert on_host.token_ids == on_device.token_ids


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, *SETTINGS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits_are_as_good_as_wide_ones(sampler: Sampler, setting: dict, dtype: torch.dtype) -> None:
    logits = (torch.randn(6, 1500) * 3).to(dtype)
    batch = inputs(6, noise=np.random.default_rng().random(6), num_logprobs=np.arange(6) % 2 - 1, **setting)
    found, expected = (sampler.sample(each, batch).wait() for each in (logits, logits.float()))
    assert found.token_ids == expected.token_ids
    assert found.logprobs is not None
    assert expected.logprobs is not None
    np.testing.assert_array_equal(found.logprobs.chosen, expected.logprobs.chosen)


def test_top_k_top_p_min_p_agree_with_transformers() -> None:
    logits = torch.randn(6, 3000) * 2
    for temperature, top_k, top_p in [(0.7, 20, 0.9), (1.2, 100, 0.6), (1.0, 3000, 0.95)]:
        warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
        )
        kept = warpers(None, logits.clone()).isfinite()
        for row, expected in enumerate(kept):
            setting = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": 0.0}
            mine = probabilities(logits[row].numpy(), **setting) > 0
            assert (torch.from_numpy(mine) == expected).all()
    kept = LogitsProcessorList([TemperatureLogitsWarper(0.9), MinPLogitsWarper(0.1)])(None, logits.clone()).isfinite()
    mine = probabilities(logits[0].numpy(), temperature=0.9, top_k=0, top_p=1.0, min_p=0.1) > 0
    assert (torch.from_numpy(mine) == kept[0]).all()


def test_noise_is_uniform_and_independent() -> None:
    """Chi-square over 64 cells, for streams that differ in the seed, the completion or the position alone."""
    count = 64 * 400
    varying, fixed = np.arange(count), np.full(count, 11)
    for columns in ((varying, fixed, fixed), (fixed, varying, fixed), (fixed, fixed, varying)):
        seeds, choices, positions = columns
        noise = uniform_noise(seeds.astype(np.uint64), choices, positions.astype(np.uint64))
        cells = np.bincount((noise * 64).astype(int), minlength=64)
        assert ((cells - 400) ** 2 / 400).sum() < 130  # p ~ 1e-6 at 63 degrees of freedom
        pairs = np.corrcoef(noise[:-1], noise[1:])[0, 1]
        assert abs(pairs) < 0.04


def test_sampled_frequencies_through_a_session() -> None:
    """The whole way, seeds drawn by the session: the first token's frequencies over many requests."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    session = make_session(vocab_size=4, logits_of=lambda contexts: logits.expand(len(contexts), -1).clone())
    count = 3000
    outputs = session.generate([[0]] * (count // 100), SamplingParams(n=100, max_tokens=1))
    drawn = Counter(completion.token_ids[0] for output in outputs for completion in output.outputs)
    expected = torch.softmax(logits, 0) * count
    chi_square = sum((drawn[token] - float(expected[token])) ** 2 / float(expected[token]) for token in range(4))
    assert chi_square < 30  # p ~ 1e-6 at 3 degrees of freedom


def test_greedy_takes_the_largest_also_among_random_rows(sampler: Sampler) -> None:
    logits = torch.randn(9, 777)
    temperature = np.where(np.arange(9) % 2, 1.0, 0.0)
    token_ids = sampler.sample(logits.clone(), inputs(9, temperature=temperature)).wait().token_ids
    assert token_ids[::2] == logits.argmax(dim=1).tolist()[::2]


def test_rows_select_and_repeat_logits(sampler: Sampler) -> None:
    logits = torch.randn(3, 50)
    samples = sampler.sample(logits.clone(), inputs(4, temperature=0.0, rows=np.array([2, 0, 0, 1]))).wait()
    assert samples.token_ids == logits.argmax(dim=1)[[2, 0, 0, 1]].tolist()


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, *SETTINGS], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_only_the_broken_row_fails(sampler: Sampler, setting: dict, bad: float | None) -> None:
    logits = torch.randn(3, 500)
    healthy = sampler.sample(logits.clone(), inputs(3, **setting)).wait().token_ids
    logits[1] = -math.inf if bad is None else logits[1]
    logits[1, 123] = -math.inf if bad is None else bad
    samples = sampler.sample(logits, inputs(3, **setting)).wait()
    assert samples.failed == {1}
    assert [samples.token_ids[0], samples.token_ids[2]] == [healthy[0], healthy[2]]


def test_edits_add_biases_then_penalise(sampler: Sampler) -> None:
    logits = torch.randn(2, 30)
    edits = LogitsEdits(
        bias_rows=np.array([0, 0, 1]),
        bias_tokens=np.array([4, 4, 5]),
        bias_offsets=np.array([1.5, 2.0, -np.inf], np.float32),
        bias_required=np.full(3, -1),
        penalty_rows=np.array([0, 0, 1]),
        penalty_tokens=np.array([4, 9, 5]),
        counts=np.array([2.0, 0.0, 1.0], np.float32),
        repetition=np.array([2.0, 2.0, 2.0], np.float32),
        frequency=np.array([0.25, 0.25, 0.5], np.float32),
        presence=np.array([0.125, 0.125, 0.75], np.float32),
    )
    edited = logits.clone()
    sampler.sample(edited, inputs(2, temperature=0.0, edits=edits)).wait()
    expected = logits.clone()
    for row, token, bias, reduction in [(0, 4, 3.5, 0.625), (0, 9, 0.0, 0.0), (1, 5, -math.inf, 1.25)]:
        value = float(logits[row, token]) + bias
        expected[row, token] = (value / 2 if value > 0 else value * 2) - reduction
    torch.testing.assert_close(edited, expected)


def serve(prompt: list[int], params: SamplingParams, logits_of) -> list[int]:
    session = make_session(vocab_size=40, logits_of=logits_of, max_num_tokens=7)
    completion = session.generate([prompt], params)[0].outputs[0]
    assert completion.error is None, completion.error
    return completion.token_ids


def hashed(contexts: list[list[int]]) -> torch.Tensor:
    rows = [torch.Generator().manual_seed(hash(tuple(context))) for context in contexts]
    return torch.stack([torch.randn(40, generator=generator) * 2 for generator in rows])


def reference_generation(
    prompt: list[int], params: SamplingParams, bans: Mapping[int, float] | None = None
) -> list[int]:
    """Greedy decoding with penalties, one token at a time, in plain Python."""
    tokens = list(prompt)
    for _ in range(params.max_tokens or 0):
        logits = hashed([tokens])[0].tolist()
        output = Counter(tokens[len(prompt) :])
        for token, bias in (bans or {}).items():
            logits[token] += bias
        for token in set(tokens):
            value = logits[token]
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        for token, count in output.items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        tokens.append(max(range(40), key=lambda token: logits[token]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_through_a_session(fields: dict) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, **fields)
    prompt = torch.randint(0, 40, (13,)).tolist()
    assert serve(prompt, params, hashed) == reference_generation(prompt, params)


def test_repetition_penalty_agrees_with_transformers() -> None:
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    tokens = prompt = torch.randint(0, 40, (9,)).tolist()
    for _ in range(30):
        tokens = [*tokens, int(processor(torch.tensor([tokens]), hashed([tokens])).argmax())]
    served = serve(prompt, SamplingParams(max_tokens=30, temperature=0.0, repetition_penalty=1.7), hashed)
    assert served == tokens[len(prompt) :]


def test_logit_bias_through_a_session() -> None:
    bias = {3: 4.0, 17: -100.0}
    params = SamplingParams(max_tokens=40, temperature=0.0, logit_bias=bias)
    assert serve([1, 2], params, hashed) == reference_generation([1, 2], params, bias)


@pytest.mark.parametrize("vocab_size", [3, 100, 5003])
def test_logprobs_are_those_of_log_softmax(vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size) * 3
    chosen = torch.randint(0, vocab_size, (4,))
    expected = torch.log_softmax(logits.double(), dim=1)
    for count in (0, 1, 5):
        found = top_logprobs(logits, chosen, count).wait()
        width = min(count, vocab_size)
        np.testing.assert_allclose(found.chosen, expected[range(4), chosen], atol=1e-5)
        np.testing.assert_allclose(found.values, expected.sort(descending=True).values[:, :width], atol=1e-5)
        order = logits.sort(dim=1, descending=True).indices
        assert (torch.from_numpy(found.token_ids) == order[:, :width]).all()
        assert [order[row].tolist().index(int(chosen[row])) + 1 for row in range(4)] == found.ranks.tolist()


@pytest.mark.parametrize("search", [candidates_on_host, candidates_on_device])
@pytest.mark.parametrize("vocab_size", [50, 64 * 40, 32000, 50257])
@pytest.mark.parametrize("count", [1, 7, 128])
def test_candidates_are_the_largest_equal_ones_by_column(search, vocab_size: int, count: int) -> None:
    count = min(count, vocab_size)
    for logits in (torch.randn(5, vocab_size), torch.randn(5, vocab_size).bfloat16().float()):
        if search is candidates_on_device and vocab_size > 64 * 40:
            logits += torch.arange(vocab_size) * 1e-6  # which of equal ones it takes at the very end is torch.topk's
        values, columns = search(logits, count)
        expected = logits.sort(dim=1, descending=True, stable=True)
        assert (values == expected.values[:, :count]).all()
        if search is candidates_on_host or len(logits.unique()) == logits.numel():
            assert (columns == expected.indices[:, :count]).all()
        assert (logits.gather(1, columns) == values).all()


def test_ties_at_the_edge_of_the_nucleus_are_kept(sampler: Sampler) -> None:
    """Half of the mass in one token, the rest in equal ones, of which top_p would need only some."""
    logits = torch.full((1, 1024), -math.inf)
    logits[0, 10] = 0.0
    logits[0, 500:532] = -math.log(32.0)
    noise = (np.arange(640) + 0.5) / 640
    samples = sampler.sample(logits.expand(640, -1).clone(), inputs(640, top_p=0.6, noise=noise)).wait()
    drawn = Counter(samples.token_ids)
    assert drawn[10] == 320
    assert set(drawn) == {10, *range(500, 532)}
    assert all(drawn[token] == 10 for token in range(500, 532))


@given(
    st.integers(1, 700),
    st.floats(0.01, 30.0),
    st.floats(1e-6, 1.0, exclude_max=True),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_floor_of_the_nucleus_is_the_reference(size: int, spread: float, top_p: float, seed: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, size, generator=generator) * spread
    logits = logits.bfloat16().float() if coarse else logits
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp()
    floors = nucleus_floor(weights, torch.full((3, 1), top_p, dtype=torch.float64))
    for row, floor in zip(weights.double(), floors.double(), strict=True):
        slack = 1e-9 * row.sum()  # masses are rounded down
        assert (row == floor).any()
        assert row[row >= floor].sum() >= top_p * row.sum() - slack
        assert row[row > floor].sum() < top_p * row.sum() + slack


class _Watch(TorchDispatchMode):
    """Records the operators that run; those whose result the host would have to wait for are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("nonzero", "_local_scalar", "masked_select", "unique")), name
        if name.startswith("aten.index"):
            assert not any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1:])), name
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def everything(count: int, vocab_size: int) -> SamplingInputs:
    """A batch of every kind of request, with edits, logprobs and pending tokens."""
    rng = np.random.default_rng()
    columns = {name: np.array([SETTINGS[row % 10][name] for row in range(count)]) for name in SETTINGS[0]}
    columns["temperature"][::7] = 0.0
    rows = np.repeat(np.arange(count), 3)
    edits = LogitsEdits(
        bias_rows=rows,
        bias_tokens=rng.integers(0, vocab_size, len(rows)),
        bias_offsets=rng.choice(np.array([-np.inf, 1.5], np.float32), len(rows)),
        bias_required=np.where(rng.random(len(rows)) < 0.5, -1, rng.integers(0, vocab_size, len(rows))),
        penalty_rows=np.arange(count),
        penalty_tokens=np.where(np.arange(count) < count // 2, -1, rng.integers(0, vocab_size, count)),
        counts=np.zeros(count, np.float32),
        repetition=np.full(count, 1.3, np.float32),
        frequency=np.full(count, 0.5, np.float32),
        presence=np.full(count, 0.25, np.float32),
        num_pending=count // 2,
    )
    places = np.where(np.arange(count) < count // 2, np.arange(count), -1)
    batch = inputs(
        count,
        noise=rng.random(count),
        num_logprobs=np.arange(count) % 3 - 1,
        rows=np.arange(count),
        edits=edits,
        **columns,
    )
    return replace(batch, pending=(torch.randint(0, vocab_size, (count,)), places))


def test_what_runs_on_a_device_never_looks() -> None:
    logits = torch.randn(24, 1500)
    batch = everything(24, 1500)
    with _Watch():
        sampling = Sampler(Draws()).sample(logits, batch)
    assert len(sampling.wait().token_ids) == 24


def test_a_greedy_batch_is_one_operator() -> None:
    logits = torch.randn(8, 500)
    with _Watch() as watch:
        Sampler(Draws()).sample(logits, inputs(8, temperature=0.0))
    assert watch.names == ["enginery.greatest.default"]


def test_large_batches_are_drawn_in_parts() -> None:
    logits = torch.randn(50, 300)
    batch = inputs(50, noise=np.random.default_rng().random(50), top_p=0.9)
    draws = Draws()
    draws.max_elements = 7 * 2**16
    parts = Sampler(draws).sample(logits.clone(), batch).wait()
    assert parts.token_ids == Sampler(Draws()).sample(logits.clone(), batch).wait().token_ids


@pytest.mark.parametrize("search", [candidates_on_host, candidates_on_device])
def test_no_rows_have_no_candidates(search) -> None:
    """The last token of a prompt has no logprob in the prompt."""
    for vocab_size in (30, 20000):
        values, columns = search(torch.empty(0, vocab_size), 5)
        assert values.shape == columns.shape == (0, 5)
    found = top_logprobs(torch.empty(0, 30), torch.empty(0, dtype=torch.int64), 3).wait()
    assert found.token_ids.shape == (0, 3)
    assert len(found.chosen) == len(found.ranks) == 0


def test_logprobs_ignore_edits_and_temperature() -> None:
    logits = torch.randn(1, 20)
    session = make_session(vocab_size=20, logits_of=lambda contexts: logits.expand(len(contexts), -1).clone())
    params = SamplingParams(max_tokens=1, temperature=0.5, logit_bias={2: 50.0}, logprobs=3, seed=1)
    completion = session.generate([[0]], params)[0].outputs[0]
    assert completion.token_ids == [2]
    assert completion.logprobs is not None
    expected = torch.log_softmax(logits[0], 0)
    assert completion.logprobs[0][2].logprob == pytest.approx(float(expected[2]), abs=1e-5)
    assert completion.cumulative_logprob == pytest.approx(float(expected[2]), abs=1e-5)
    assert set(completion.logprobs[0]) == {2, *torch.topk(expected, 3).indices.tolist()}
