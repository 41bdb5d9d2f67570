"""`LLM`: the composition root, the one place that wires checkpoint, frontend, builder and session together."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from enginery import env
from enginery.checkpoint.bounded_json import read_json
from enginery.checkpoint.checkpoint import Checkpoint
from enginery.checkpoint.tokenizer import Tokenizer
from enginery.engine.artifact import is_engine, open_artifact
from enginery.engine.builder import build as build_network
from enginery.engine.builder import pipeline_config, prepare
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.engine.manifest import Facts, Manifest
from enginery.engine.memory import MemoryPlan, plan_memory
from enginery.engine.protocol import Progress
from enginery.engine.regions import outline
from enginery.errors import (
    CheckpointError,
    EngineFileError,
    EngineryWarning,
    RequestError,
    UnsupportedError,
    UsageError,
)
from enginery.prompts import (
    Messages,
    Params,
    Prompt,
    Read,
    is_chat,
    listed_conversations,
    listed_params,
    listed_prompts,
    read_chat,
    read_prompt,
)
from enginery.rewriting.attributes import check_is_rule
from enginery.rewriting.isolation import check_tokens_apart
from enginery.rewriting.pipeline import apply_phases
from enginery.rewriting.pipeline import nearest_miss as explain_rule
from enginery.runtime.outputs import RequestOutput
from enginery.runtime.sampling_params import RequestOutputKind, SamplingParams
from enginery.runtime.session import Session, SessionConfig
from enginery.runtime.stats import SessionStats
from enginery.runtime.streams import Stream, Streams

if TYPE_CHECKING:
    from enginery.frontends.huggingface import Imported
    from enginery.network import Network
    from enginery.rewriting.explain import Miss
    from enginery.rewriting.pipeline import PipelineConfig, PipelineReport

BUNDLED_MODEL = Path(__file__).parent / "models" / "enginery-6m"
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""files of a checkpoint that its engine needs beside the network and the weights"""


@dataclasses.dataclass(frozen=True)
class Opened:
    """An engine and the directory that has its tokenizer."""

    engine: Engine
    directory: Path


def build(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    config: BuildConfig | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Engine:
    """Builds the engine of a checkpoint and opens it.

    Args:
        model: checkpoint directory or hub id; None: the bundled model.
        output: directory of the engine, replaced atomically at the end; None: the cache, keyed by the content of the
            checkpoint and the configuration, where a former build is found again.
        config, settings: a `BuildConfig`, or its fields.
    """
    config = dataclasses.replace(config or BuildConfig(), **settings)
    checkpoint = Checkpoint.open(BUNDLED_MODEL if model is None else model)
    directory = Path(output) if output is not None else cached_engine(checkpoint, config)
    if output is None and (engine := _load_cached(directory, config, progress)) is not None:
        return engine
    return _build(checkpoint, config, directory, progress)


def _load_cached(directory: Path, config: BuildConfig, progress: Progress | None) -> Engine | None:
    """None if it has to be built; one that was damaged has to, and makes room."""
    try:
        if is_engine(directory):
            return Engine.load(directory, config, progress=progress)
    except EngineFileError as error:
        warnings.warn(f"{error.cause}; it is built again", EngineryWarning, stacklevel=2)
    shutil.rmtree(directory, ignore_errors=True)
    return None


def open_model(
    model: str | Path | None, config: BuildConfig, *, trust_engine_code: bool = False, progress: Progress | None = None
) -> Opened:
    """The engine of an engine directory, a checkpoint directory or a hub id, built if it has to be.

    With the eager backend nothing is written: the weights of the checkpoint are bound in memory.
    """
    if model is not None and is_engine(Path(model)):
        engine = Engine.load(Path(model), config, trust_engine_code=trust_engine_code, progress=progress)
        return Opened(engine, Path(model))
    if config.backend == "eager":
        checkpoint = Checkpoint.open(BUNDLED_MODEL if model is None else model)
        return Opened(_build(checkpoint, config, None, progress), checkpoint.directory)
    engine = build(model, config=config, progress=progress)
    return Opened(engine, Path(engine.directory or ""))


def _build(checkpoint: Checkpoint, config: BuildConfig, directory: Path | None, progress: Progress | None) -> Engine:
    _check_carried(checkpoint.directory)
    if progress is not None:
        progress("import", 0, 0)
    imported = import_network(checkpoint, config)
    carried = [path for name in CARRIED_FILES if (path := checkpoint.directory / name).is_file()]
    return build_network(imported, checkpoint.read, config, directory, carry=carried, progress=progress)


def _check_carried(directory: Path) -> None:
    """What would stop an engine from being opened is told before it is built."""
    if (directory / "tokenizer.json").is_file():
        Tokenizer.from_directory(directory)
    _default_params(directory)


def import_network(checkpoint: Checkpoint, config: BuildConfig) -> Imported:
    """The network of a checkpoint as it is before any rule, and the facts of its model."""
    config.resolved_device()  # what cannot be is told before the seconds of an import
    for rule in config.rules:
        check_is_rule(rule)
    from enginery.frontends.huggingface import import_checkpoint  # here: transformers takes seconds to import

    return import_checkpoint(checkpoint, dtype=config.torch_dtype)


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """A checkpoint's network as it was imported and behind all phases, and what they did."""

    title: str
    imported: Network
    network: Network
    report: PipelineReport
    obstacle: str
    """why no engine can run the network; empty if one can"""
    _config: PipelineConfig

    def nearest_miss(self, rule: str) -> Miss | None:
        """Why a rule of the phases does not fit the network that its phase finds; None if it does."""
        return explain_rule(self.imported.copy(), rule, self._config)


def rewriting_of(model: str | Path | None = None, **settings: Any) -> Rewriting:
    """What the phases do to the network of a checkpoint. No weight is read. `settings` are fields of `BuildConfig`."""
    if model is not None and is_engine(Path(model)):
        fix = f"Give the checkpoint; the engine's own network is {Path(model) / 'network.txt'}"
        raise UsageError(f"{model} is an engine: its phases have run", fix)
    config = BuildConfig(**settings)
    checkpoint = Checkpoint.open(BUNDLED_MODEL if model is None else model)
    network, phases = import_network(checkpoint, config).network, pipeline_config(config)
    imported = network.copy()
    report, obstacle = apply_phases(network, phases), ""
    try:
        check_tokens_apart(network)
    except UnsupportedError as error:
        obstacle = str(error)
    return Rewriting(checkpoint.directory.name, imported, network, report, obstacle, phases)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model is and what an engine of it would need."""

    format: str
    facts: Facts
    plan: MemoryPlan
    regions: Mapping[str, int]
    """name of each distinct region, and its layers"""
    advice: str

    def summary(self) -> dict[str, Any]:
        """In JSON types."""
        plan = self.plan
        sizes = {name: getattr(plan, name) for name in ("available", "weights", "activations", "kv_cache", "total")}
        limits = dataclasses.asdict(plan.limits)
        del limits["step_sizes"]  # only an open engine has them
        parts = {"facts": dataclasses.asdict(self.facts), "limits": limits, "bytes": sizes}
        return {"format": self.format, **parts, "regions": dict(self.regions), "advice": self.advice}


def inspect_model(model: str | Path | None = None, **settings: Any) -> Inspection:
    """Inspects a checkpoint or an engine directory without reading a weight. `settings` are fields of `BuildConfig`."""
    config = BuildConfig(**settings)
    network, manifest = step_network(model, **settings)
    if model is not None and is_engine(Path(model)):
        kind, advice = "engine", f"enginery run {model} PROMPT"
    else:
        checkpoint = Checkpoint.open(BUNDLED_MODEL if model is None else model)
        kind = f"Hugging Face checkpoint, {len(checkpoint.tensors)} tensors, {checkpoint.nbytes:,} bytes"
        advice = f"enginery build {checkpoint.directory} -o DIR"
    regions = outline(network)
    names = {region.name: len(region.network) for region in regions.distinct.values()}
    plan = plan_memory(network, regions, manifest.facts, config, manifest.device)
    return Inspection(kind, manifest.facts, plan, names, advice)


def step_network(model: str | Path | None = None, **settings: Any) -> tuple[Network, Manifest]:
    """The network that an engine of the model runs in every step, and what the engine says of itself. No weight is
    read. `settings` are fields of `BuildConfig`.
    """
    config = BuildConfig(**settings)
    if model is not None and is_engine(Path(model)):
        artifact = open_artifact(Path(model))
        return artifact.network, artifact.manifest
    prepared = prepare(import_network(Checkpoint.open(BUNDLED_MODEL if model is None else model), config), config)
    return prepared.parts.network, prepared.manifest


def cached_engine(checkpoint: Checkpoint, config: BuildConfig) -> Path:
    """Where the cache has the engine of this content: weights, configuration, the caller's rules, our version."""
    rules = [_rule_digest(rule) for rule in config.rules]
    key = json.dumps([version("enginery"), checkpoint.digest(), config.cache_key(), rules]).encode()
    return env.cache_dir() / "engines" / f"{checkpoint.directory.name}-{hashlib.sha256(key).hexdigest()[:16]}"


def _rule_digest(rule: Any) -> str:
    """Of the file that a rule is written in, and of its attributes. Where there is no file (an interactive session), or
    attributes are more than plain values, never twice the same."""
    try:
        source = Path(inspect.getfile(type(rule))).read_bytes()
        return hashlib.sha256(source + json.dumps(vars(rule), sort_keys=True).encode()).hexdigest()
    except (OSError, TypeError, ValueError):
        return uuid.uuid4().hex


class LLM:
    """A language model that is ready to generate.

    Args:
        model: engine directory, checkpoint directory or hub id; None: the bundled model. A checkpoint is built into the
            cache on first use.
        dtype: "auto" (that of the checkpoint), "float32", "bfloat16" or "float16".
        quantization: None, or "fp8": linear layers in 8-bit floats.
        device: "auto", "cpu" or "cuda".
        max_model_len: longest sequence in tokens; None: that of the model, or what memory allows.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: new tokens of one step, over all sequences; 512 on a CPU, on a GPU 8192 and one for each
            of max_num_seqs.
        kv_cache_memory: bytes of the KV cache; None: what is free, within reason.
        backend: "compiled", or "eager": no compilation, slow, the reference.
        disabled_rules: rewrite rules to switch off, by name.
        rules: rewrite rules of your own, applied in a phase of their own.
        prefix_caching: reuse the keys and values of equal prefixes.
        seed: of requests that have none.
        progress: called with (stage, done, total) during long work.

    Calls from several threads take turns. Requests that come and go share a batch by the session's `add` and `step`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | None = None,
        backend: str = "compiled",
        disabled_rules: Sequence[str] = (),
        rules: Sequence[Any] = (),
        prefix_caching: bool = True,
        trust_engine_code: bool = False,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        config = BuildConfig(
            dtype=dtype,
            quantization=quantization,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            backend=backend,
            disabled_rules=disabled_rules,  # type: ignore[arg-type]  # it makes tuples, or says what is wrong
            rules=rules,  # type: ignore[arg-type]
        )
        opened = open_model(model, config, trust_engine_code=trust_engine_code, progress=progress)
        self.engine = opened.engine
        has_tokenizer = (opened.directory / "tokenizer.json").is_file()
        self.tokenizer = Tokenizer.from_directory(opened.directory) if has_tokenizer else None
        eos = self.engine.facts.eos_token_ids
        session = SessionConfig(eos_token_ids=eos, prefix_caching=prefix_caching, seed=seed)
        self.session = Session(self.engine, self.tokenizer, session)
        self._streams = Streams(self.session)
        self.default_params = _default_params(opened.directory)

    # Generating

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: Params | Sequence[Params] | None = None
    ) -> list[RequestOutput]:
        """Completes one prompt or many, together in one batch, and returns their outputs in order.

        Args:
            prompts: text, token ids, or `{"prompt": ...}` / `{"prompt_token_ids": [...]}`, or a list of those.
            params: one for all, or one for each prompt; None: those of the model's generation_config.json.

        Raises:
            RequestError: a prompt or its parameters are invalid; no request of the call is run.
        """
        return self._finish([read_prompt(prompt, self.tokenizer) for prompt in listed_prompts(prompts)], params)

    def chat(
        self, messages: Messages | Iterable[Messages], params: Params | Sequence[Params] | None = None, **template: Any
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them. `template` goes to the chat template."""
        conversations = listed_conversations(messages)
        return self._finish([read_chat(each, self.tokenizer, template) for each in conversations], params)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> Stream:
        """Yields one output a step, with the text and tokens that are new since the last one.

        A list of messages is answered as a chat. Several streams may be open, and `generate` be called meanwhile.
        Closing one, or letting go of it, cancels its request.
        """
        wanted = self.default_params if params is None else params
        if not isinstance(wanted, SamplingParams):
            raise RequestError(f"params is a {type(wanted).__name__}", "Give SamplingParams; others go to generate()")
        text, ids = read_chat(prompt, self.tokenizer, {}) if is_chat(prompt) else read_prompt(prompt, self.tokenizer)  # type: ignore[arg-type]
        with self._streams.turn():
            wanted = dataclasses.replace(wanted, output_kind=RequestOutputKind.DELTA)
            return self._streams.open(self.session.add(ids, wanted, prompt=text))

    def _finish(self, prompts: list[Read], params: Params | Sequence[Params] | None) -> list[RequestOutput]:
        each = listed_params(params, self.default_params, len(prompts))
        with self._streams.turn():
            return self.session.generate([tokens for _, tokens in prompts], each, [text for text, _ in prompts])

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.has_chat_template

    # Life

    def metrics(self) -> SessionStats:
        """Counters since the start and the state of the KV memory now."""
        return self.session.stats()

    def close(self) -> None:
        """Cancels what runs and frees the engine."""
        self.session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _default_params(directory: Path) -> SamplingParams:
    """What the model's authors recommend in generation_config.json; greedy where they do not sample."""
    path = directory / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    if not config.get("do_sample", False):
        return SamplingParams(temperature=0.0, max_tokens=None)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: config[name] for name in names if config.get(name) is not None}
    try:
        return SamplingParams(max_tokens=None, **values)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error.cause}", f"{error.fix}, or remove the file") from None
