"""What an engine is built for: validated, hashable, part of the key under which a build is found again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from enginery.engine import gpu
from enginery.errors import EngineryWarning, UsageError
from enginery.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("compiled", "eager")
BLOCK_SIZE = 16
"""tokens of one KV block"""
MAX_COUNT = 1 << 24
"""no count of tokens or sequences is larger"""

_RUN_TIME = frozenset({"max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "backend"})
"""Fields that change how an engine runs but not what is built."""


@dataclass(frozen=True)
class BuildConfig:
    """Raises UsageError for a value that no engine can have, naming the flag.

    Attributes:
        dtype: of weights and activations; "auto": that of the checkpoint.
        quantization: how the linear layers are quantised, by the name of a scheme, such as "fp8"; None: not at all.
        device: "auto": cuda if there is one, else cpu.
        max_model_len: longest sequence in tokens; None: that of the model, or what memory allows.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: new tokens of one step over all sequences; None: 512 on a CPU, on a GPU 8192 and one for
            each of max_num_seqs.
        kv_cache_memory: bytes of the KV cache; None: what is free, within reason.
        backend: "compiled" regions, or "eager": the network's references, no compilation.
        disabled_rules: names of rewrite rules that are left out.
        rules: rewrite rules of the caller's own.
    """

    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    backend: str = "compiled"
    disabled_rules: tuple[str, ...] = ()
    rules: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            _one_of("quantization", self.quantization, tuple(SCHEMES))
        _one_of("device", self.device, DEVICES)
        _one_of("backend", self.backend, BACKENDS)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            _count(name, getattr(self, name), MAX_COUNT, optional=name != "max_num_seqs")
        _count("kv_cache_memory", self.kv_cache_memory, 1 << 50, optional=True)
        object.__setattr__(self, "disabled_rules", _listed("disabled_rules", self.disabled_rules, "rule names"))
        object.__setattr__(self, "rules", _listed("rules", self.rules, "rules"))
        for name in self.disabled_rules:
            if not isinstance(name, str):
                raise UsageError(f"disabled_rules has {name!r}", "Give the names of rules, such as 'MergeReshapes'")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for "auto"."""
        import torch  # here: the command line reads configurations without loading torch

        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def resolved_device(self) -> str:
        """ "cpu" or "cuda". Raises UsageError where cuda is asked for and cannot be used; "auto" says why it is not."""
        if self.device == "cpu":
            return "cpu"
        missing = gpu.obstacle(self.backend)
        if missing is None:
            return "cuda"
        if self.device == "cuda":
            raise UsageError(missing.cause, missing.fix)
        if missing.has_gpu:
            warnings.warn(f"the GPU is not used: {missing.cause}. {missing.fix}", EngineryWarning, stacklevel=2)
        return "cpu"

    def to_json(self) -> dict[str, Any]:
        """Values of JSON types; a rule is given by its qualified name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["disabled_rules"] = sorted(self.disabled_rules)
        values["rules"] = [_rule_name(rule) for rule in self.rules]
        return values

    def cache_key(self) -> Mapping[str, Any]:
        """What decides the content of the built engine; limits that are chosen when it is opened are left out."""
        return {name: value for name, value in self.to_json().items() if name not in _RUN_TIME}


def _rule_name(rule: Any) -> str:
    return f"{type(rule).__module__}.{type(rule).__qualname__}"


def _listed(name: str, values: Any, items: str) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UsageError(f"{name} is {values!r}", f"Give a tuple of {items}, or () for none")
    return tuple(values)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}", f"Set --{name} to one of {', '.join(allowed)}")


def _count(name: str, value: object, limit: int, *, optional: bool) -> None:
    if value is None and optional:
        return
    flag = "--" + name.replace("_", "-")
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}, not a whole number", f"Set {flag}")
    if not 1 <= value <= limit:
        raise UsageError(f"{name} is {value}, outside 1..{limit}", f"Set {flag}")


__all__ = ["BLOCK_SIZE", "BuildConfig"]
