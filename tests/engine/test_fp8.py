"""An engine in 8-bit floats: on disk and back, compiled and eager, beside the model that it was made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.conftest import CONFIG, EAGER
from tests.engine.decoder import Batcher, Decoder, imported, random_tokens, reader

from enginery.engine.builder import build
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.engine.protocol import StepInputs
from enginery.errors import UsageError

FP8 = dataclasses.replace(EAGER, quantization="fp8")
LOGITS = 0.04
"""of the logits' norm; 0.01 to 0.02 is found"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, in_cache: None, model: Decoder) -> Path:
    target = tmp_path_factory.mktemp("fp8") / "engine"
    build(imported(model), reader(model), FP8, target).close()
    return target


def steps(model: Decoder) -> list[tuple[StepInputs, torch.Tensor]]:
    batcher = Batcher(model)
    first, second = (batcher.add(random_tokens(40, seed)) for seed in range(2))
    return [batcher.step(parts) for parts in ([(first, 20)], [(first, 1)], [(first, 1), (second, 9)])]


def test_from_disk_it_is_near_the_model(directory: Path, model: Decoder) -> None:
    engine = Engine.load(directory, EAGER)
    for inputs, expected in steps(model):
        error = (engine.execute(inputs) - expected).norm() / expected.norm()
        assert 0 < error < LOGITS


def test_weights_are_eight_bits_wide_on_disk(directory: Path, model: Decoder) -> None:
    weights = load_file(directory / "weights-00001-of-00001.safetensors")
    narrow = {name: value for name, value in weights.items() if value.dtype == torch.float8_e4m3fn}
    assert len(narrow) == 5 * len(model.layers)  # query and key are one, the value has a bias
    up = next(value for name, value in narrow.items() if name.startswith("layers.1.up."))
    scale = model.layers[1].up.weight.detach().abs().amax(1, keepdim=True) / 448
    assert torch.equal(up.float(), (model.layers[1].up.weight / scale).to(torch.float8_e4m3fn).float())
    assert weights["embed.weight"].dtype == torch.float32


def test_the_engine_knows_how_it_was_quantised(directory: Path) -> None:
    assert json.loads((directory / "engine.json").read_text())["config"]["quantization"] == "fp8"
    Engine.load(directory, FP8).close()


def test_an_engine_without_is_not_opened_with(eager_engine: Path) -> None:
    with pytest.raises(UsageError, match=r"quantization None, not fp8\. Leave --quantization out") as caught:
        Engine.load(eager_engine, FP8)
    assert "\n" not in str(caught.value)


def test_the_scheme_is_part_of_the_cache_key() -> None:
    assert BuildConfig().cache_key() != BuildConfig(quantization="fp8").cache_key()


def test_compiled_equals_eager(tmp_path: Path, in_cache: None) -> None:
    model = Decoder(layers=1)
    config = dataclasses.replace(CONFIG, quantization="fp8")
    compiled = build(imported(model), reader(model), config, tmp_path / "engine")
    eager = Engine.load(tmp_path / "engine", FP8)
    for inputs, expected in steps(model):
        logits = compiled.execute(inputs)
        assert (logits - expected).norm() / expected.norm() < LOGITS
        assert (logits - eager.execute(inputs)).norm() / expected.norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_on_a_gpu(quantization: str | None, tmp_path: Path) -> None:
    """In bfloat16: linear layers run by the GPU's own kernels, or in 8-bit floats."""
    model = Decoder(layers=2).bfloat16()
    config = dataclasses.replace(CONFIG, quantization=quantization, device="cuda")
    engine = build(imported(model), reader(model), config, tmp_path / "engine")
    assert engine.manifest.device == "cuda"
    for inputs, expected in steps(model):
        assert (engine.execute(inputs).cpu() - expected).norm() / expected.norm() < 1.5 * LOGITS
