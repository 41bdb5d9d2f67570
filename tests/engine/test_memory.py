"""The memory plan: what fits is said before anything is allocated, and binding weights holds one expression at a
time.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import EAGER
from tests.engine.decoder import HEAD_DIM, KV_HEADS, LONGEST, Imported

from enginery import ops
from enginery.engine import memory
from enginery.engine.binding import WeightEvaluator, nbytes, split
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.engine.memory import activation_bytes, plan_memory
from enginery.engine.regions import outline
from enginery.engine.weights_file import WeightWriter, plan_layout
from enginery.errors import ResourceError, UsageError
from enginery.network import Dim, Network
from enginery.rewriting.pipeline import run_phases

BLOCK = 2 * 3 * KV_HEADS * HEAD_DIM * 16 * 4
"""bytes of one KV block of the small decoder: keys and values of three layers in float32"""


@pytest.fixture
def planned(source: Imported):
    run_phases(source.network)
    network = split(source.network).network
    return lambda **settings: plan_memory(network, outline(network), source.facts, BuildConfig(**settings), "cpu")


def test_blocks_follow_from_the_memory_of_the_cache(planned) -> None:
    plan = planned(kv_cache_memory=100 * BLOCK + 7, max_num_seqs=64)
    assert plan.block == BLOCK
    assert plan.limits.num_blocks == 100
    assert plan.limits.max_model_len == LONGEST
    assert plan.kv_cache == 100 * BLOCK
    assert "100 blocks of 16 tokens" in str(plan)


def gpu_plan(source: Imported, monkeypatch: pytest.MonkeyPatch, free: int, **settings):
    """As on a GPU with so much free memory."""
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    run_phases(source.network)
    network = split(source.network).network
    return plan_memory(network, outline(network), source.facts, BuildConfig(**settings), "cuda")


def test_a_gpu_keeps_room_for_sampling_and_captured_steps(source: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gpu_plan(source, monkeypatch, 1 << 30)
    assert plan.sampling == 4 * 4 * plan.limits.vocab_size * 256
    assert plan.graphs == plan.activations
    assert plan.total <= plan.available
    assert "CUDA graphs" in str(plan)
    config = BuildConfig(max_num_seqs=256)
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 << 30)
    measured = memory.measured_plan(plan, config, 1 << 20)
    assert (measured.activations, measured.graphs) == (1 << 20, 1 << 20)
    assert measured.available == (2 << 30) + plan.weights
    assert measured.limits.max_model_len == LONGEST


@pytest.mark.parametrize(("settings", "tokens"), [({}, 8192 + 48), ({"max_num_batched_tokens": 4096}, 4096)], ids=str)
def test_a_step_on_a_gpu_has_room_for_prompts_beside_all_that_decode(
    settings: dict[str, int], tokens: int, source: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = gpu_plan(source, monkeypatch, 1 << 30, max_num_seqs=48, **settings)
    assert plan.limits.max_num_tokens == tokens


def test_a_gpu_that_is_too_small_is_told_with_what_is_needed(source: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"weights of .* do not fit into 1.00 MiB free on cuda") as caught:
        gpu_plan(source, monkeypatch, 1 << 20)
    assert "--max-num-batched-tokens" in str(caught.value)


def test_a_cache_that_leaves_no_room_for_a_step_is_refused(source: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"does not fit.*--kv-cache-memory"):
        gpu_plan(source, monkeypatch, 1 << 30, kv_cache_memory=1 << 30)


def test_no_more_blocks_than_can_be_used(planned) -> None:
    assert planned(max_num_seqs=2).limits.num_blocks == 2 * LONGEST // 16 + 1


def test_a_length_that_was_not_asked_for_shrinks_to_what_fits(planned) -> None:
    limits = planned(kv_cache_memory=5 * BLOCK).limits
    assert (limits.num_blocks, limits.max_model_len) == (5, 80)


def test_a_length_that_does_not_fit_is_an_error_that_names_one_that_does(planned) -> None:
    with pytest.raises(ResourceError, match="--max-model-len to at most 80") as caught:
        planned(kv_cache_memory=5 * BLOCK, max_model_len=81)
    assert caught.value.exit_code == 4
    with pytest.raises(ResourceError, match="Raise --kv-cache-memory"):
        planned(kv_cache_memory=BLOCK - 1)


def test_more_than_the_model_or_the_machine_has(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"at most {LONGEST}"):
        planned(max_model_len=LONGEST + 1)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1 << 20)
    with pytest.raises(ResourceError, match="Lower --kv-cache-memory"):
        planned(kv_cache_memory=1 << 30)
    with pytest.raises(ResourceError, match="a sequence of 256 tokens needs"):
        planned()


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("3000\n")
    monkeypatch.setattr(memory, "_CGROUP_FILES", ((tmp_path / "max", tmp_path / "current"), ("/absent", "/absent")))
    assert memory.available_memory("cpu") == 2000
    (tmp_path / "max").write_text("max\n")
    assert memory.available_memory("cpu") > 1 << 20


def test_activations_are_the_peak_of_what_lives_at_once() -> None:
    network = Network()
    x = network.add_input("x", (Dim.symbol("tokens"), 10), torch.float32)
    y = network.call(torch.ops.aten.neg.default, x)
    z = network.call(torch.ops.aten.cat.default, (y, y, y), 1)
    network.set_output("result", network.call(torch.ops.aten.sum.dim_IntList, z, (1,)))
    # y and its three copies live together; the sum is one column
    assert activation_bytes(outline(network), 100, 4, 0) == 100 * 4 * (10 + 30) + 2 * 100 * 4


def test_eager_engines_use_their_blocks_only(eager_engine: Path) -> None:
    engine = Engine.load(eager_engine, dataclasses.replace(EAGER, kv_cache_memory=4 * BLOCK))
    assert engine.limits.num_blocks == 4
    assert engine.limits.max_model_len == 64
    assert engine.summary()["limits"]["num_blocks"] == 4


LAYERS, SIZE = 24, 512


def test_binding_holds_one_expression_at_a_time(tmp_path: Path) -> None:
    """24 fused and packed weights of 3 MiB: never more than a few of them are alive while they are written."""
    network = Network()
    for i in range(LAYERS):
        parts = [network.add_constant(f"layers.{i}.{name}", (SIZE, SIZE), torch.float32) for name in "qkv"]
        fused = network.call(torch.ops.aten.cat.default, tuple(parts))
        network.set_output(f"out{i}", network.call(ops.pack_linear, fused))
    weights = split(network).weights
    alive = Alive()

    def read(name: str) -> torch.Tensor:
        return alive.watch(torch.full((SIZE, SIZE), float(len(name))))

    evaluator = WeightEvaluator(network, weights.values(), read)
    layout = plan_layout(split(network).network.constants)
    with WeightWriter(tmp_path, layout) as writer:
        for name, tensor in weights.items():
            writer.write(name, evaluator.value(tensor))
    assert alive.total == 3 * LAYERS
    assert alive.peak <= 4
    assert sum(nbytes(tensor) for tensor in weights.values()) == LAYERS * 3 * SIZE * SIZE * 4


class Alive:
    """Counts the tensors that are alive among those that it watched."""

    def __init__(self) -> None:
        self.count = self.peak = self.total = 0

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.total += 1
        self.peak = max(self.peak, self.count)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.count -= 1


def test_weights_are_mapped_and_freed(eager_engine: Path) -> None:
    file = str(eager_engine / "weights-00001-of-00001.safetensors")
    engine = Engine.load(eager_engine, EAGER)
    assert file in Path("/proc/self/maps").read_text()
    engine.close()
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()
