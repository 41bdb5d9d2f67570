"""`inspect --profile`, and the timer behind `--measure` with interpreted regions in the place of compiled ones."""

from __future__ import annotations

import json

import pytest
import torch
from tests.cli.test_commands import enginery

from enginery.analysis import Step
from enginery.checkpoint import Checkpoint
from enginery.cli.measure import REPEATS, WARM_UP, RegionTimer, batch, kv_pools
from enginery.cli.profile import InspectOptions, profile_model
from enginery.engine.engine import check_inputs
from enginery.engine.memory import caches
from enginery.engine.protocol import EngineLimits, StepInputs
from enginery.engine.regions import outline
from enginery.errors import UsageError
from enginery.llm import BUNDLED_MODEL, step_network
from enginery.network import Program


def test_profile_as_json_is_complete() -> None:
    done = enginery("inspect", "--json", "--profile", "--tokens", "4", "--sequences", "2", "--context", "100",
                    "--device-spec", "h200")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["profile"]["rows"]
    assert {row["part"] for row in rows} == {"prologue", "model.layers.0", "epilogue"}
    total = found["profile"]["total"]
    assert total["flops"] == sum(row["cost"]["flops"] * row["count"] for row in rows)
    assert total["roofline_seconds"] == pytest.approx(sum(row["roofline_seconds"] * row["count"] for row in rows))
    assert found["profile"]["step"] == {"tokens": 4, "sequences": 2, "context": 100}
    assert found["profile"]["without_flops"] == {}
    assert found["dtypes"]["dtype"] == "bfloat16"
    assert "measured" not in found


def test_a_mistake_is_one_line() -> None:
    done = enginery("inspect", "--profile", "--device-spec", "h300")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --device-spec names no device 'h300'. Give one of cpu, h200")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": "1", "sequences": "2"}, "1 new tokens cannot be divided over 2 sequences. Raise --tokens"),
        ({"context": "99999"}, "a sequence of 100000 tokens is longer than the model's 1024. Lower --context"),
        ({"tokens": "2k", "context": "0"}, "a sequence of 2000 tokens is longer than the model's 1024"),
        ({"tokens": "many"}, "--tokens 'many' is not a count"),
        ({"sequences": "0"}, "--sequences 0 is no step"),
    ],
)
def test_a_step_that_cannot_be_is_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as error:
        InspectOptions(**options).step(longest=1024)
    assert words in str(error.value)


def test_a_step_is_one_token_a_sequence_behind_the_usual_context() -> None:
    assert InspectOptions().step(longest=8192) == Step(1, 1, 1024)
    assert InspectOptions(sequences="8").step(longest=512) == Step(8, 8, 511)
    assert InspectOptions(tokens="2k").step(longest=2048) == Step(2000, 1, 48)


def test_only_a_compiled_engine_has_regions_to_measure() -> None:
    with pytest.raises(UsageError, match=r"only a compiled engine has regions to measure\. Leave --backend out"):
        profile_model(None, InspectOptions(measure=True, backend="eager"))


@pytest.mark.parametrize("step", [Step(1, 1, 0), Step(5, 2, 30), Step(40, 3, 16), Step(4, 4, 100)])
def test_the_batch_is_one_that_an_engine_takes(step: Step) -> None:
    arrays = batch(step, 50, torch.Generator().manual_seed(0))
    blocks = step.symbols["num_blocks"]
    inputs = StepInputs(**{name: value.numpy() for name, value in arrays.items()})
    check_inputs(inputs, EngineLimits(50, step.longest, step.tokens, step.sequences, blocks, step.block_size))
    assert len(set(arrays["slot_mapping"].tolist())) == step.tokens
    assert arrays["block_tables"].shape == (step.sequences, step.symbols["blocks"])
    assert arrays["logits_indices"].tolist() == (arrays["query_start"][1:] - 1).tolist()


def test_the_timer_runs_every_region_in_order_and_gives_the_network_s_logits() -> None:
    network, _ = step_network(dtype="float32")
    checkpoint, step = Checkpoint.open(BUNDLED_MODEL), Step(5, 2, 3)
    generator = torch.Generator().manual_seed(0)
    values = {tensor: torch.randn(tensor.shape, generator=generator) * 0.05 for tensor in network.constants}
    values.update(kv_pools(caches(network), step, "cpu", generator))
    arrays = batch(step, checkpoint.config["vocab_size"], generator)
    values.update((tensor, arrays[tensor.name]) for tensor in network.inputs if tensor.name in arrays)
    regions = outline(network)
    ran, results = [], []

    def running(program: Program, key: str):
        def run(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
            ran.append(key)
            results[:] = program(arguments)
            return list(results)

        return run

    runs = {
        key: running(Program(list(region.network), region.network.inputs, region.network.outputs), key)
        for key, region in regions.distinct.items()
    }
    copies = {tensor: value.clone() for tensor, value in values.items()}
    times = RegionTimer(regions, runs, values, lambda: None).measure()
    assert list(times) == [region.name for region in regions.distinct.values()]
    assert all(seconds > 0 for seconds in times.values())
    assert ran == [region.key for region in regions.regions] * (WARM_UP + REPEATS)
    order = [*network.inputs, *network.constants]
    (logits,) = Program(list(network), order, network.outputs)([copies[tensor] for tensor in order])
    torch.testing.assert_close(results[0], logits)
