"""Engines under one interface: prompts in, that many new tokens each, done when the call returns."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from decoder.checkpoint import RandomCheckpoint
from decoder.job import Job, NotAvailable
from decoder.shapes import LLAMA_8B, TINY
from enginery.engine.builder import build
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.runtime.outputs import RequestOutput
from enginery.runtime.sampling_params import RequestOutputKind, SamplingParams
from enginery.runtime.session import Session, SessionConfig

Prompts = Sequence[list[int]]


class Runner(Protocol):
    def generate(self, prompts: Prompts, new_tokens: Sequence[int]) -> None: ...


def shape_of(job: Job) -> dict[str, Any]:
    config = TINY if job.tiny else LLAMA_8B
    return {**config, "num_hidden_layers": job.layers or config["num_hidden_layers"]}


def checkpoint_of(job: Job) -> RandomCheckpoint:
    return RandomCheckpoint(shape_of(job), torch.bfloat16, job.device)


# Enginery


class EngineRunner:
    def __init__(self, engine: Engine) -> None:
        self.session = Session(engine, None, SessionConfig(prefix_caching=False))

    def generate(self, prompts: Prompts, new_tokens: Sequence[int]) -> None:
        self._check(self.session.generate(prompts, [greedy(count) for count in new_tokens]), new_tokens)

    def serve(self, prompts: Prompts, new_tokens: Sequence[int]) -> None:
        """One request after another comes in, and is begun in that order."""
        ids = [self.session.add(prompt, greedy(count)) for prompt, count in zip(prompts, new_tokens, strict=True)]
        final: dict[str, RequestOutput] = {}
        while self.session.has_work:
            final |= {output.request_id: output for output in self.session.step() if output.finished}
        self._check([final[request_id] for request_id in ids], new_tokens)

    def _check(self, outputs: Sequence[RequestOutput], new_tokens: Sequence[int]) -> None:
        for output, count in zip(outputs, new_tokens, strict=True):
            (completion,) = output.outputs
            if completion.error is not None:
                raise RuntimeError(completion.error)
            if len(completion.token_ids) != count:
                raise RuntimeError(f"{len(completion.token_ids)} tokens instead of {count}, {completion.finish_reason}")


def greedy(count: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def build_config(job: Job) -> BuildConfig:
    fields = {field.name for field in dataclasses.fields(BuildConfig)}
    settings: dict[str, Any] = {}
    if job.dtype == "fp8":
        if "quantization" not in fields:
            raise NotAvailable("this version has no quantization")
        settings["quantization"] = "fp8"
    return BuildConfig(
        dtype="bfloat16",
        device=job.device,
        backend=job.backend,
        max_model_len=job.sizes.max_model_len,
        max_num_seqs=job.sizes.max_num_seqs,
        max_num_batched_tokens=job.step_tokens,
        **settings,
    )


class Stages:
    """Seconds from the beginning to the first event of each stage of a build."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.regions = 0

    def event(self, stage: str, done: int, total: int) -> None:
        self.seconds.setdefault(stage, round(time.perf_counter() - self._begin, 2))
        if stage == "compile":
            self.regions = total

    def total(self) -> float:
        return time.perf_counter() - self._begin


def built(job: Job) -> tuple[Engine, Stages]:
    """Imports, rewrites, compiles, binds, writes and opens; weights are drawn when they are bound."""
    from enginery.frontends.huggingface import import_checkpoint

    config, checkpoint, stages = build_config(job), checkpoint_of(job), Stages()
    imported = import_checkpoint(checkpoint, dtype=torch.bfloat16)
    engine = build(imported, checkpoint.read, config, Path(job.directory), progress=stages.event)
    return engine, stages


# Peers


class TransformersRunner:
    """`generate` with SDPA attention, on the weights that Enginery has. Shorter prompts are padded on the left, and a
    batch runs until its longest request is done."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        checkpoint = checkpoint_of(job)
        config = LlamaConfig.from_dict(checkpoint.config)
        with torch.device(job.device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(checkpoint.read(name))
        self.device = job.device

    @torch.inference_mode()
    def generate(self, prompts: Prompts, new_tokens: Sequence[int]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(self.device)
        count = max(new_tokens)
        self.model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        if self.device == "cuda":
            torch.cuda.synchronize()


class VllmRunner:
    """vLLM with its own random weights of the same shape."""

    def __init__(self, job: Job) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            raise NotAvailable("vLLM is not installed") from None
        directory = Path(job.directory).with_name("vllm-shape")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps({**shape_of(job), "dtype": "bfloat16"}))
        self._params = SamplingParams
        self.llm = LLM(
            str(directory),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            quantization="fp8" if job.dtype == "fp8" else None,
            max_model_len=job.sizes.max_model_len,
            max_num_seqs=job.sizes.max_num_seqs,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Prompts, new_tokens: Sequence[int]) -> None:
        params = [
            self._params(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for count in new_tokens
        ]
        self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
