"""Build configurations: what cannot be is refused with the flag, and the cache key holds what decides the content."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from enginery.engine.config import BuildConfig
from enginery.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"dtype": "float8"}, "--dtype"),
        ({"device": "tpu"}, "--device"),
        ({"quantization": "int3"}, "--quantization to one of fp8"),
        ({"backend": "fast"}, "--backend"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"max_model_len": True}, "--max-model-len"),
        ({"max_num_seqs": None}, "--max-num-seqs"),
        ({"max_num_seqs": 1 << 40}, "--max-num-seqs"),
        ({"max_num_batched_tokens": 2.5}, "--max-num-batched-tokens"),
        ({"kv_cache_memory": -1}, "--kv-cache-memory"),
        ({"disabled_rules": "MergeParallelLinears"}, "tuple"),
        ({"disabled_rules": ("DeadCode", 5)}, "disabled_rules has 5. Give the names"),
        ({"rules": None}, "Give a tuple of rules"),
    ],
)
def test_what_no_engine_can_have(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=flag) as caught:
        BuildConfig(**settings)
    assert caught.value.exit_code == 2


def test_the_cache_key_is_json_and_follows_the_content_only() -> None:
    base = BuildConfig()
    key = json.dumps(base.cache_key())
    for same in ({"max_model_len": 5}, {"max_num_seqs": 3}, {"kv_cache_memory": 9}, {"backend": "eager"}):
        assert json.dumps(dataclasses.replace(base, **same).cache_key()) == key
    for other in (
        {"dtype": "bfloat16"},
        {"quantization": "fp8"},
        {"disabled_rules": ("PackLinears",)},
        {"device": "cpu"},
    ):
        assert json.dumps(dataclasses.replace(base, **other).cache_key()) != key
    rules = [BuildConfig(disabled_rules=order).cache_key() for order in (("A", "B"), ("B", "A"))]
    assert rules[0] == rules[1]


def test_reading_a_configuration_does_not_load_torch() -> None:
    code = "import sys, enginery.engine.config, enginery.engine.protocol; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
