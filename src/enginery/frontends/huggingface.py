"""The network of a Hugging Face decoder: no model is written by hand.

transformers builds the model without data, torch.export captures it over one packed sequence of a symbolic number of
tokens, with attention and experts as operators of ours, and every parameter becomes a constant that names a tensor of
the checkpoint.

    inputs   token_ids [tokens] int64, positions [tokens] int64
    output   logits [tokens, vocabulary]
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from enginery.checkpoint import Checkpoint
from enginery.errors import CheckpointError, EngineryError, EngineryWarning, NetworkError, UnsupportedError
from enginery.frontends import capture
from enginery.frontends.buffers import compute_buffers, settle_rotary
from enginery.frontends.weights import WeightPlan, check_shape, plan_weights, record_conversion
from enginery.network import Network, Tensor

EXAMPLE_TOKENS = 7
"""length of the sequence that is traced; the number of tokens stays symbolic"""
MAX_TOKENS = 1 << 24
STALE_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$", r"\.attention\.bias$")
"""what older versions of transformers stored beside the weights, and computes today"""
UNBOUNDED_POSITIONS = 1 << 20
"""for models that name no longest sequence (ALiBi)"""


@dataclass(frozen=True)
class ModelFacts:
    """What the rest of the system needs to know of a model beside its network."""

    architecture: str
    """class name in transformers, such as LlamaForCausalLM"""
    model_type: str
    vocab_size: int
    """rows of the logits"""
    max_position_embeddings: int
    """longest sequence that the model was made for, in tokens"""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Imported:
    network: Network
    facts: ModelFacts


def import_checkpoint(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, max_length: int | None = None
) -> Imported:
    """The network and the facts of a checkpoint. Constants are floating in `dtype`, or as the checkpoint says.

    `max_length` is the longest sequence to be served (default: the longest that the model was made for); models whose
    rotary frequencies depend on the length get those of that length.

    Raises UnsupportedError with the construct that stopped the import, CheckpointError if a tensor is missing or
    does not fit.
    """
    config = _config(checkpoint)
    dtype = dtype or _dtype(checkpoint, config)
    _require_enough_tensors(config, checkpoint)
    model = _build(config, dtype)
    plan = plan_weights(model, checkpoint)
    _warn_of_unused(model, plan, checkpoint)
    tied = _settle_ties(model, plan, checkpoint)
    rotary = settle_rotary(model, max_length or _longest(model.config.get_text_config()))
    program, shapes = _export(model)
    _name_parameters(program, plan, tied)
    network = _to_network(program, shapes, model)
    _compute_parameters(network, model, plan, checkpoint)
    unknown = _check_constants(network, checkpoint)
    buffers = dict(model.named_buffers())
    for name in unknown:
        if name not in buffers:
            raise CheckpointError(f"{checkpoint.directory}: no tensor for the parameter {name}", "Is a shard missing?")
    network.values.update(compute_buffers(model, unknown))
    network.values.update({name: value for name, value in rotary.items() if name in network.values})
    return Imported(network, _facts(checkpoint, model, network, dtype))


def _config(checkpoint: Checkpoint) -> PreTrainedConfig:
    values = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    kind = values["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        named = (values.get("architectures") or [kind])[0]
        raise UnsupportedError(
            f"{checkpoint.directory}: transformers {transformers.__version__} does not know {named} ({kind})",
            "Install a newer transformers; code that comes with a checkpoint is never run",
        )
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # transformers validates with errors of many classes
        raise CheckpointError(f"{checkpoint.directory / 'config.json'}: {_line(error)}") from None


def _require_enough_tensors(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Before thousands of layers are built that nobody has weights for."""
    layers, found = config.get_text_config().num_hidden_layers, len(checkpoint.tensors)
    if layers > found:
        raise CheckpointError(
            f"{checkpoint.directory}: config.json names {layers} layers, but there are {found} tensors in all",
            "Is config.json of another model, or a shard missing?",
        )


def _warn_of_unused(model: PreTrainedModel, plan: WeightPlan, checkpoint: Checkpoint) -> None:
    expected = [*(model._keys_to_ignore_on_load_unexpected or ()), *STALE_BUFFERS]
    unused = [name for name in plan.unused if not any(re.search(pattern, name) for pattern in expected)]
    if unused:
        warnings.warn(
            f"{checkpoint.directory}: the model that config.json names has no place for {len(unused)} tensors, such as "
            f"{unused[0]}",
            EngineryWarning,
            stacklevel=3,
        )


def _dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that the configuration names, else the one that most of the checkpoint's bytes have."""
    named = config.get_text_config().dtype or config.dtype
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without data, ready to be captured."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"{config.model_type} cannot be imported: it is no causal language model")
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    capture.register()
    config.use_cache = False
    config._experts_implementation = capture.NAME
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=dtype, attn_implementation=_attention_of(kind)).eval()
    except EngineryError:
        raise
    except Exception as error:
        raise CheckpointError(f"the configuration makes no {kind.__name__}: {_line(error)}") from None
    for pattern, wide in model._get_dtype_plan(dtype).items():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if f".{pattern}." in f".{name}.":
                tensor.data = tensor.data.to(wide)
    # Fake tensors pose as the CPU's: on the meta device the small constants of model code would lose their values.
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        return model._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))


def _attention_of(kind: type[PreTrainedModel]) -> str:
    """Ours where the model dispatches its attention; else the model's own arithmetic, which a rule recognises."""
    if hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return capture.NAME
    return "sdpa" if kind._supports_sdpa else "eager"


def _settle_ties(model: PreTrainedModel, plan: WeightPlan, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter to the one that it shares its tensor with, and whose tensor the checkpoint has.

    Tied parameters that the checkpoint stores with different values are made two again, as transformers does.
    """
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if target in plan.names and source in plan.names:
            one, other = (checkpoint.read(plan.names[name]) for name in (target, source))
            if one.shape != other.shape or not torch.equal(one, other):
                path, _, name = target.rpartition(".")
                parameter = torch.nn.Parameter(torch.empty_like(model.get_parameter(target)), requires_grad=False)
                setattr(model.get_submodule(path), name, parameter)
                continue
        if source in plan.names or target not in plan.names:
            tied[target] = source
        else:
            tied[source] = target
    return tied


def _export(model: PreTrainedModel) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    captured = model.forward

    def forward(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return captured(input_ids=token_ids[None], position_ids=positions[None], use_cache=False).logits[0]

    model.forward = forward  # so that names and module paths are the model's own, without a wrapper's
    try:
        try:
            return _export_up_to(model, MAX_TOKENS)
        except Exception as error:
            # Tables of masks and biases, which a rule replaces, may hold the sequence within their size.
            if "Constraints violated" not in str(error):
                raise
            return _export_up_to(model, _longest(model.config) - 1)
    except EngineryError as error:
        raise UnsupportedError(f"{model.config.model_type} cannot be imported: {error.cause}", error.fix) from None
    except Exception as error:  # torch.export and model code raise whatever they like
        cause = f"{model.config.model_type} cannot be imported: {_obstacle(error)}{_place(error)}"
        raise UnsupportedError(cause) from error
    finally:
        model.forward = captured


def _export_up_to(model: PreTrainedModel, longest: int) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    tokens = torch.export.Dim("tokens", min=1, max=longest)
    shapes = {"token_ids": {0: tokens}, "positions": {0: tokens}}
    # two objects: torch.export takes one tensor given twice for one input
    examples = tuple(torch.zeros(EXAMPLE_TOKENS, dtype=torch.int64) for _ in shapes)
    with torch.no_grad():
        return torch.export.export(model, examples, dynamic_shapes=shapes, strict=False), shapes


def _to_network(program: torch.export.ExportedProgram, shapes: Any, model: PreTrainedModel) -> Network:
    try:
        network = Network.from_exported_program(program, shapes)
        network.values = {name: value for name, value in network.values.items() if not isinstance(value, FakeTensor)}
    except NetworkError as error:
        raise UnsupportedError(f"{model.config.model_type} cannot be imported: {error.cause}", error.fix) from None
    network.rename_output("output", "logits")
    return network


def _name_parameters(program: torch.export.ExportedProgram, plan: WeightPlan, tied: Mapping[str, str]) -> None:
    """Gives the program's parameters the names of their checkpoint tensors; tied ones get the same."""
    for spec in program.graph_signature.input_specs:
        name = tied.get(spec.target or "", spec.target or "")
        spec.target = plan.names.get(name, name) if spec.target is not None else None


def _compute_parameters(network: Network, model: PreTrainedModel, plan: WeightPlan, checkpoint: Checkpoint) -> None:
    """Puts expressions over checkpoint tensors in the place of the parameters that no single tensor holds."""
    constants = {tensor.name: tensor for tensor in network.constants}

    def constant(name: str, dtype: torch.dtype) -> Tensor:
        info = checkpoint.tensors[name]
        return network.add_constant(name, info.shape, dtype if info.dtype.is_floating_point else info.dtype)

    beginning = next(iter(network), None)
    with network.inserting_before(beginning, module_path="weights"):
        for conversion in plan.conversions:
            for name, value in record_conversion(network, model, conversion, constant).items():
                parameter = constants.get(name)
                if parameter is None:
                    continue
                if value.shape != parameter.shape:
                    sources = next(iter(conversion.sources.values()))
                    raise CheckpointError(
                        f"{checkpoint.directory}: {sources[0]} and its like make the shape {list(value.shape)}, "
                        f"but {name} needs {list(parameter.shape)}",
                        "Is config.json of another model?",
                    )
                parameter.replace_all_uses_with(value)


def _check_constants(network: Network, checkpoint: Checkpoint) -> list[str]:
    """Drops what no layer reads, checks what the checkpoint has; the names of the buffers that are still to compute."""
    unknown = []
    for tensor in network.constants:
        if not tensor.users and not tensor.is_output:
            network.remove_constant(tensor)
        elif tensor.name in checkpoint.tensors:
            check_shape(checkpoint.tensors[tensor.name], tensor)
        elif tensor.name not in network.values:
            unknown.append(tensor.name)
    return unknown


def _facts(checkpoint: Checkpoint, model: PreTrainedModel, network: Network, dtype: torch.dtype) -> ModelFacts:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    (logits,) = network.outputs
    return ModelFacts(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        vocab_size=int(logits.shape[-1]),  # type: ignore[arg-type]
        max_position_embeddings=_longest(config),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        dtype=dtype,
        bos_token_id=config.bos_token_id if isinstance(config.bos_token_id, int) else None,
        eos_token_ids=checkpoint.eos_token_ids,
    )


def _longest(config: PreTrainedConfig) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return UNBOUNDED_POSITIONS


def _obstacle(error: BaseException) -> str:
    """What stopped torch.export, in one line."""
    text = str(error)
    if "specialized it to be a constant" in text:
        return "its code is unrolled over the tokens of a sequence, as recurrences are"
    if guard := re.search(r"the generated guard (.*?)\.?\n", text):
        condition = re.sub(r"L\['\w+'\]\.size\(\)\[0\]", "tokens", guard[1])
        return f"its code holds only where {condition}"
    if "data-dependent" in text:
        return f"its control flow depends on data ({_line(error)})"
    return _line(error)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    joined = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return joined[:300].rstrip(".")


def _place(error: BaseException) -> str:
    """Where in the model's code it happened: ` at modeling_x.py:12`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/transformers/models/" in frame.filename]
    return f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
