"""Values of the tables that a model computes for itself and no checkpoint stores: rotary frequencies, scales."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from enginery.errors import UnsupportedError


def compute_buffers(model: PreTrainedModel, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The values of the named buffers of a model without data. Replaces them in the model.

    Each module that owns one runs the initialisation that transformers runs after loading. Raises UnsupportedError for
    a buffer that it leaves undefined.
    """
    values: dict[str, torch.Tensor] = {}
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    for path, members in owners.items():
        module = model.get_submodule(path)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _undefined(buffer)
        with torch.no_grad():
            _owner(model, path)._init_weights(module)
        for name in members:
            value = module._buffers[name.rpartition(".")[2]]
            if value is None or _is_undefined(value):
                raise UnsupportedError(
                    f"{model.config.model_type} cannot be imported: nothing computes the buffer {name}"
                )
            values[name] = value
    return values


def settle_rotary(model: PreTrainedModel, longest: int) -> dict[str, torch.Tensor]:
    """Fixes rotary embeddings that would choose their frequencies by the length of each sequence.

    LongRoPE and dynamic NTK scaling look at the largest position of a batch; sequences that share a step, or a cached
    prefix, cannot. Their frequencies become those of the longest sequence to be served. Gives the buffers' values.
    """
    values: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        per_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in per_layer_type.items():
            if not isinstance(kind, str) or (kind != "longrope" and "dynamic" not in kind):
                continue
            named = {} if layer_type is None else {"layer_type": layer_type}
            prefix = "" if layer_type is None else f"{layer_type}_"
            value, _ = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=longest, **named)
            values[f"{path}.{prefix}inv_freq"] = value
            module.rope_type = "default" if layer_type is None else {**module.rope_type, layer_type: "default"}
    return values


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model around a module: the one whose rules initialise it."""
    found, module = model, model
    for part in path.split(".") if path else []:
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            found = module
    return found


def _undefined(buffer: torch.Tensor) -> torch.Tensor:
    fill = (
        float("nan")
        if buffer.is_floating_point()
        else torch.iinfo(buffer.dtype).min
        if buffer.dtype != torch.bool
        else False
    )
    return torch.full(buffer.shape, fill, dtype=buffer.dtype)


def _is_undefined(value: torch.Tensor) -> bool:
    if value.is_floating_point():
        return bool(value.isnan().any())
    return value.dtype != torch.bool and bool((value == torch.iinfo(value.dtype).min).any())
