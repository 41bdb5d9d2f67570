"""The sampler on a GPU: the same tokens as the same code gives on a CPU, and never a wait before `Sampling.wait`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from enginery.kernels.table import TABLE
from enginery.runtime.batch import SamplingInputs
from enginery.runtime.draws import Draws
from enginery.runtime.logprobs import top_logprobs
from enginery.runtime.sampler import Sampler, Samples

from .test_sampler import SETTINGS, everything, inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCABULARIES = [777, 32000, 50257]
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Those that an engine would have loaded."""
    TABLE.load("cuda")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any operator that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cuda(batch: SamplingInputs) -> SamplingInputs:
    return batch if batch.pending is None else replace(batch, pending=(batch.pending[0].cuda(), batch.pending[1]))


def assert_same(found: Samples, expected: Samples) -> None:
    assert found.token_ids == expected.token_ids
    assert found.failed == expected.failed
    assert found.logprobs_row == expected.logprobs_row
    if expected.logprobs is not None:
        assert found.logprobs is not None
        np.testing.assert_allclose(found.logprobs.chosen, expected.logprobs.chosen, atol=1e-4)
        np.testing.assert_allclose(found.logprobs.values, expected.logprobs.values, atol=1e-4)
        np.testing.assert_array_equal(found.logprobs.token_ids, expected.logprobs.token_ids)
        np.testing.assert_array_equal(found.logprobs.ranks, expected.logprobs.ranks)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("setting", [GREEDY, *SETTINGS], ids=str)
def test_the_same_tokens_as_on_a_cpu(setting: dict, vocab_size: int) -> None:
    logits = torch.randn(16, vocab_size) * 3
    batch = inputs(16, noise=np.random.default_rng().random(16), num_logprobs=4, **setting)
    expected = Sampler(Draws()).sample(logits.clone(), batch).wait()
    assert_same(Sampler().sample(logits.cuda(), batch).wait(), expected)


@pytest.mark.parametrize("size", [*VOCABULARIES, 128256, 151936])
def test_the_greatest_can_be_captured_and_is_that_of_one_reduction(size: int) -> None:
    logits = (torch.randn(16, size) / 50).bfloat16().float().cuda()
    logits[1, 5::7], logits[2, 3::9], logits[3] = torch.nan, torch.inf, -torch.inf
    Draws().greatest(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        best, token_ids = Draws().greatest(logits)
    logits.copy_(logits.flip(0))
    graph.replay()
    expected, columns = logits.max(dim=1)
    assert torch.equal(token_ids, columns)
    assert torch.equal(best.nan_to_num(nan=-7), expected.nan_to_num(nan=-7))


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_mixed_batch_is_sampled_without_a_wait(vocab_size: int) -> None:
    logits = torch.randn(24, vocab_size) * 3
    batch = everything(24, vocab_size)
    device_logits, device_batch = logits.cuda(), on_cuda(batch)
    Sampler().sample(device_logits.clone(), device_batch).wait()  # the first use of a kernel may load it
    with no_synchronisation():
        sampling = Sampler().sample(device_logits, device_batch)
    assert sampling.token_ids.is_cuda
    found = sampling.wait()
    assert sampling.token_ids.tolist() == found.token_ids
    assert_same(found, Sampler(Draws()).sample(logits, batch).wait())


def test_prompt_logprobs_do_not_wait() -> None:
    logits, chosen = torch.randn(9, 3001), torch.randint(0, 3001, (9,))
    device_logits = logits.cuda()
    top_logprobs(device_logits, chosen, 5).wait()
    with no_synchronisation():
        pending = top_logprobs(device_logits, chosen, 5), top_logprobs(device_logits, chosen.cuda(non_blocking=True), 0)
    expected = top_logprobs(logits, chosen, 5).wait()
    np.testing.assert_allclose(pending[0].wait().values, expected.values, atol=1e-4)
    np.testing.assert_array_equal(pending[0].wait().token_ids, expected.token_ids)
    np.testing.assert_allclose(pending[1].wait().chosen, expected.chosen, atol=1e-4)


def test_no_rows_have_no_logprobs() -> None:
    found = top_logprobs(torch.empty(0, 30).cuda(), torch.empty(0, dtype=torch.int64), 3).wait()
    assert found.token_ids.shape == (0, 3)


def test_copies_in_flight_are_not_overwritten() -> None:
    """Many steps are sampled while the device is kept busy, each with its own parameters; none is waited for."""
    logits = torch.randn(16, 4000).cuda() * 2
    rng = np.random.default_rng()
    batches = [inputs(16, noise=rng.random(16), top_p=rng.uniform(0.2, 1.0, 16)) for _ in range(30)]
    one_by_one = [Sampler().sample(logits.clone(), batch).wait().token_ids for batch in batches]
    copies = [logits.clone() for _ in batches]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    with no_synchronisation():
        together = [Sampler().sample(copy, batch) for copy, batch in zip(copies, batches, strict=True)]
    assert [sampling.wait().token_ids for sampling in together] == one_by_one


def test_steps_feed_each_other_on_the_device() -> None:
    """A token that was never on the host is penalised in the next step: greedy rows do not repeat it."""
    logits = torch.randn(12, 1000).cuda()
    batch = on_cuda(everything(12, 1000))
    assert batch.edits is not None
    edits = replace(
        batch.edits, bias_rows=np.zeros(0, np.int64), penalty_rows=np.arange(12), penalty_tokens=np.full(12, -1),
        frequency=np.full(12, 100.0, np.float32), num_pending=12,
    )  # fmt: skip
    greedy = inputs(12, temperature=0.0)
    Sampler().sample(logits.clone(), greedy).wait()
    torch.cuda._sleep(50_000_000)
    with no_synchronisation():
        first = Sampler().sample(logits.clone(), greedy)
        second = Sampler().sample(
            logits.clone(), replace(greedy, edits=edits, pending=(first.token_ids, np.arange(12)))
        )
    order = logits.sort(dim=1, descending=True).indices
    assert first.wait().token_ids == order[:, 0].tolist()
    assert second.wait().token_ids == order[:, 1].tolist()


@pytest.mark.parametrize("setting", [GREEDY, *SETTINGS], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), None])
def test_only_the_broken_row_fails(setting: dict, bad: float | None) -> None:
    logits = torch.randn(3, 500).cuda()
    healthy = Sampler().sample(logits.clone(), inputs(3, **setting)).wait().token_ids
    logits[1] = -torch.inf if bad is None else logits[1]
    logits[1, 123] = -torch.inf if bad is None else bad
    sampling = Sampler().sample(logits, inputs(3, **setting))
    assert 0 <= int(sampling.token_ids[1]) < 500
    samples = sampling.wait()
    assert samples.failed == {1}
    assert [samples.token_ids[0], samples.token_ids[2]] == [healthy[0], healthy[2]]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Coarse logits, as a model in bfloat16 gives them, have many ties."""
    logits = (torch.randn(len(SETTINGS) * 4, 32000) * 2).bfloat16().float().cuda()
    count = len(logits)
    noise = np.random.default_rng().random(count)
    mixed = {name: np.array([SETTINGS[row % len(SETTINGS)][name] for row in range(count)]) for name in SETTINGS[0]}
    together = Sampler().sample(logits.clone(), inputs(count, noise=noise, **mixed)).wait().token_ids
    for row in range(count):
        own = {name: column[row] for name, column in mixed.items()}
        alone = Sampler().sample(logits[row : row + 1].clone(), inputs(1, noise=noise[row], **own)).wait().token_ids
        assert alone == [together[row]]


def test_memory_comes_to_rest() -> None:
    """After a few steps no step asks the driver for memory, and none keeps any."""
    logits = torch.randn(24, 32000).cuda()
    batch = on_cuda(everything(24, 32000))

    def step() -> None:
        Sampler().sample(logits.clone(), batch).wait()

    for _ in range(3):
        step()
    before = torch.cuda.memory_stats()
    for _ in range(20):
        step()
    after = torch.cuda.memory_stats()
    for name in ("segment.all.allocated", "allocated_bytes.all.current"):
        assert after[name] == before[name]
