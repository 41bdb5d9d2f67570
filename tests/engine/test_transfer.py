"""Weights that arrive while other work goes on. On a GPU also: beside steps that are captured meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from enginery.engine import transfer
from enginery.engine.transfer import COPYING_THREADS, Transfer

CPU = torch.device("cpu")


def random_weights(count: int) -> dict[str, torch.Tensor]:
    return {f"weight{i}": torch.randn(3, 5 + i) for i in range(count)}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a transfer is other memory than that of its weights."""
    monkeypatch.setattr(transfer, "_place", lambda value, _: torch.full_like(value, torch.nan))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies wait for it."""
    event, copy = threading.Event(), transfer._copy

    def wait_and_copy(target: torch.Tensor, value: torch.Tensor) -> None:
        assert event.wait(20)
        copy(target, value)

    monkeypatch.setattr(transfer, "_copy", wait_and_copy)
    yield event
    event.set()


def test_weights_that_are_there_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_copy", None)
    weights = random_weights(3)
    with Transfer(weights, CPU) as moved:
        moved.wait()
    assert all(moved.placed[name] is value for name, value in weights.items())


def test_places_are_known_before_the_values_arrive(elsewhere: None, gate: threading.Event) -> None:
    weights = random_weights(40)
    with Transfer(weights, CPU) as moved:
        assert moved.placed.keys() == weights.keys()
        assert all(value.isnan().all() for value in moved.placed.values())
        places = {name: value.data_ptr() for name, value in moved.placed.items()}
        gate.set()
        moved.wait()
    assert all(torch.equal(moved.placed[name], value) for name, value in weights.items())
    assert {name: value.data_ptr() for name, value in moved.placed.items()} == places


def test_values_that_may_be_places_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs before the others have arrived must not look up what lay there before."""
    weights = {"weight": torch.randn(5), "places": torch.randint(2**40, (5,)), "mask": torch.ones(5, dtype=torch.bool)}
    arrive = threading.Event()

    def copy(target: torch.Tensor, value: torch.Tensor) -> None:
        assert threading.current_thread() is threading.main_thread() or arrive.wait(20)
        target.copy_(value)

    monkeypatch.setattr(transfer, "_place", lambda value, _: torch.zeros_like(value))
    monkeypatch.setattr(transfer, "_copy", copy)
    with Transfer(weights, CPU) as moved:
        there = {name for name, value in moved.placed.items() if torch.equal(value, weights[name])}
        arrive.set()
        moved.wait()
    assert there == {"places", "mask"}
    assert torch.equal(moved.placed["weight"], weights["weight"])


def test_parameters_leave_no_trace_of_gradients(elsewhere: None) -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    with Transfer({"weight": weight}, CPU) as moved:
        moved.wait()
    assert torch.equal(moved.placed["weight"], weight)
    assert moved.placed["weight"].grad_fn is None


def test_a_copy_that_fails_is_told(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: torch.Tensor, value: torch.Tensor) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(transfer, "_copy", fail)
    with pytest.raises(RuntimeError, match="CUDA error"), Transfer(random_weights(3), CPU) as moved:
        moved.wait()


def test_an_error_meanwhile_ends_what_has_not_begun(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    release, barrier = threading.Event(), threading.Barrier(COPYING_THREADS + 1)

    def copy(target: torch.Tensor, value: torch.Tensor) -> None:
        begun.append(1)
        barrier.wait(20)
        assert release.wait(20)

    def shutdown(pool: ThreadPoolExecutor, *, wait: bool, cancel_futures: bool) -> None:
        """Lets the copies that run end when the others are cancelled."""
        original(pool, wait=False, cancel_futures=cancel_futures)
        release.set()
        original(pool, wait=wait)

    original = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(transfer, "_copy", copy)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    with pytest.raises(ZeroDivisionError), Transfer(random_weights(40), CPU):
        _ = barrier.wait(20) / 0
    assert len(begun) == COPYING_THREADS


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_graph_that_was_captured_before_the_weights_arrived_reads_them(gate: threading.Event) -> None:
    weights = {f"weight{i}": torch.randn(256, 256) for i in range(20)}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with Transfer(weights, torch.device("cuda")) as moved, torch.cuda.stream(stream):
        torch.stack(list(moved.placed.values())).sum(0)  # loads the kernels
        graph.capture_begin(capture_error_mode="thread_local")
        gate.set()  # copies run while the stream is captured
        total = torch.stack(list(moved.placed.values())).sum(0)
        moved.wait()
        graph.capture_end()
    graph.replay()
    torch.testing.assert_close(total.cpu(), torch.stack(list(weights.values())).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_kernels_that_had_the_memory_before_do_not_write_to_weights() -> None:
    value = torch.randn(8 << 20)
    torch.cuda.empty_cache()
    before = torch.zeros(value.shape, device="cuda")
    place = before.data_ptr()
    torch.cuda._sleep(500_000_000)
    before.fill_(1)
    del before
    with Transfer({"weight": value}, torch.device("cuda")) as moved:
        moved.wait()
    assert moved.placed["weight"].data_ptr() == place
    torch.cuda.synchronize()
    assert torch.equal(moved.placed["weight"].cpu(), value)
