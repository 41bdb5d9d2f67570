"""From the names of a checkpoint's tensors to the parameters of a transformers model.

transformers renames tensors on loading, adds or drops the prefix of the base model, and computes some parameters from
several tensors (one tensor per expert, stacked). The same steps are taken here on tensors without data, and recorded: a
renaming becomes the name of a constant, a computation becomes layers over constants, which run once, when weights are
bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from enginery.checkpoint import Checkpoint, TensorInfo
from enginery.errors import CheckpointError
from enginery.network import Network, Tensor


@dataclass(frozen=True)
class Conversion:
    """Parameters that are computed from checkpoint tensors: pattern of the converter to tensor names, in order."""

    converter: WeightConverter
    first_target: str
    sources: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightPlan:
    """`names`: parameter to the checkpoint tensor that it is. `conversions`: those that are computed."""

    names: Mapping[str, str]
    conversions: tuple[Conversion, ...]
    unused: tuple[str, ...]
    """checkpoint tensors that the model has no place for"""


def plan_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> WeightPlan:
    """Finds a place for each tensor of the checkpoint, as `from_pretrained` would."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    unused: list[str] = []
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unused.append(name)
        elif pattern is None:
            names[target] = name
        else:
            fresh = Conversion(deepcopy(by_pattern[pattern]), target)
            conversions.setdefault(target, fresh).sources.setdefault(pattern, []).append(name)
    return WeightPlan(names, tuple(conversions.values()), tuple(unused))


def record_conversion(
    network: Network, model: PreTrainedModel, conversion: Conversion, constant: Callable[[str, torch.dtype], Tensor]
) -> dict[str, Tensor]:
    """Appends the conversion's layers at the network's cursor; gives the parameters that it computes.

    `constant` makes the constant of a checkpoint tensor in the dtype of the parameter.
    """
    dtype = model.state_dict()[conversion.first_target].dtype
    recorder = _Recorder(network)
    converter = conversion.converter
    collected: Any = converter.collected_tensors
    for pattern, names in conversion.sources.items():
        for name in names:
            collected[pattern].append(recorder.stand_in(constant(name, dtype)))
    with recorder:
        results = converter.convert(conversion.first_target, model=model, config=model.config)
    tensors = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
    return {name: recorder.tensor_of(value) for name, value in tensors.items()}


class _Recorder(TorchDispatchMode):
    """Records what is computed on tensors without data as layers of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.known: dict[int, tuple[torch.Tensor, Tensor]] = {}

    def stand_in(self, tensor: Tensor) -> torch.Tensor:
        """A tensor without data that stands for the network's."""
        shape: Any = tensor.shape
        return self._remember(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor)

    def tensor_of(self, value: torch.Tensor) -> Tensor:
        return self.known[id(value)][1]

    def _remember(self, value: torch.Tensor, tensor: Tensor) -> torch.Tensor:
        self.known[id(value)] = (value, tensor)  # the value is kept: its id must not be used again
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = self.network.call(func, *self._translate(args), **self._translate(kwargs or {}))
        if isinstance(result, torch.Tensor):
            assert isinstance(outputs, Tensor)  # noqa: S101  (one result, one output)
            return self._remember(result, outputs)
        return type(result)(self._remember(value, output) for value, output in zip(result, outputs, strict=True))

    def _translate(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor_of(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._translate(item) for item in value)
        if isinstance(value, dict):
            return {key: self._translate(item) for key, item in value.items()}
        return value


def check_shape(info: TensorInfo, tensor: Tensor) -> None:
    """Raises CheckpointError if the checkpoint's tensor does not fit the model's parameter."""
    if info.shape != tensor.shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has shape {list(info.shape)} but the model needs {list(tensor.shape)}",
            "Is config.json of another model?",
        )
