from __future__ import annotations

import pytest
from tests.checkpoint.writing import CONFIG

from enginery.checkpoint.config import check_config
from enginery.errors import CheckpointError, UnsupportedError

REFUSED = {
    "num_hidden_layers": [10**9, 0, -1, "24", 2.5, True],
    "hidden_size": [0, 1 << 40, "big", 9],
    "num_attention_heads": [0, 3, "2"],
    "num_key_value_heads": [0, 3, -1],
    "vocab_size": [-1, 0, "32000", 1 << 40],
    "intermediate_size": [0, -5, "x"],
    "max_position_embeddings": [0, -1, "4k"],
    "rope_theta": [-1.0, 0, "10000", float("inf"), float("nan"), True],
    "rms_norm_eps": [-1e-5, "small"],
    "sliding_window": [-4, "8"],
    "num_local_experts": [10**9, -1],
    "layer_types": [["full_attention"], "full", [1, 2]],
    "model_type": [None, 7],
    "architectures": ["LlamaForCausalLM", [7]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_absurd_values_are_refused_by_key_and_value(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_config({**CONFIG, key: value}, "config.json")
    text = str(caught.value)
    assert key in text or "heads" in text
    assert repr(value) in text or str(value) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2}}, "factor is -2"),
        ({"rope_parameters": {"full_attention": {"rope_theta": "x"}}}, "rope_theta is 'x'"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "5 experts per token of only 4"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10000000"),
    ],
)
def test_relations_and_nested_tables(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_config(CONFIG | change, "config.json")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", None])
def test_quantised_checkpoints_are_named(method: str | None) -> None:
    with pytest.raises(UnsupportedError, match=str(method or "unnamed")):
        check_config(CONFIG | {"quantization_config": {"quant_method": method, "bits": 4}}, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": None, "head_dim": None},
        {"hidden_size": 10, "head_dim": 16},
        {"hidden_size": 9, "kv_lora_rank": 4, "num_key_value_heads": 2},
        {"intermediate_size": [16, 32]},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_real_configurations_pass(change: dict) -> None:
    check_config(CONFIG | change, "config.json")
