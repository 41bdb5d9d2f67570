"""The models on which the rules are measured: architectures of transformers with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers as hf

from decoder.checkpoint import RandomCheckpoint
from decoder.shapes import LLAMA_8B
from enginery import env
from enginery.checkpoint import Checkpoint

HIDDEN = 1024
SIZES: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": HIDDEN, "num_attention_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA = {**SIZES, "intermediate_size": 2816, "num_key_value_heads": 4}
GPT2 = {"vocab_size": 8000, "n_positions": 2048, "n_embd": HIDDEN, "n_head": 16}
FALCON = {**SIZES, "new_decoder_architecture": False, "multi_query": False}

MODELS: Mapping[str, tuple[type[hf.PreTrainedConfig], dict[str, Any]]] = MappingProxyType({
    "llama": (hf.LlamaConfig, LLAMA),
    "llama, tied": (hf.LlamaConfig, {**LLAMA, "tie_word_embeddings": True}),
    "granite": (
        hf.GraniteConfig,
        {**LLAMA, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 16.0},
    ),
    "gemma": (hf.GemmaConfig, {**LLAMA, "head_dim": 64}),
    "minicpm3": (
        hf.MiniCPM3Config,
        {**LLAMA, "num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_rope_head_dim": 32,
         "qk_nope_head_dim": 32, "v_head_dim": 64, "tie_word_embeddings": False},
    ),
    "opt": (hf.OPTConfig, {**SIZES, "ffn_dim": 4096, "word_embed_proj_dim": HIDDEN}),
    "gpt2": (hf.GPT2Config, GPT2),
    "falcon": (hf.FalconConfig, {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon, alibi and bias": (hf.FalconConfig, {**FALCON, "alibi": True, "bias": True}),
    "bloom": (hf.BloomConfig, {"vocab_size": 8000, "hidden_size": HIDDEN, "n_head": 16}),
    "mpt": (hf.MptConfig, {"vocab_size": 8000, "d_model": HIDDEN, "n_heads": 16, "max_seq_len": 2048}),
})  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
"""what configurations call the number of layers"""

LAYOUT = "SinkTransposes + TransposeOfUnsqueeze + SelectBeforeTranspose + CancelTransposes"
"""They move transposes until these cancel, one of them alone moves little."""
GLUE = ("FuseAddNorm", "FuseSiluMul", "FuseRotary")
INTO_LINEARS = ("FuseNormLinear", "FuseGate")

FIRES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "llama": (
        "MergeParallelLinears", "PackLinears", "GatherEarlier", "GatherInLastLayer", *GLUE, "ScaleBeforeLinear", LAYOUT,
        "CommonSubexpressions", "DropCasts", "DropIdentities", "ViewToReshape", "MergeReshapes", "PageAttention",
    ),
    "llama, tied": ("PackTiedEmbedding",),
    "granite": ("ScaleIntoLinear", "ScaleIntoEmbedding"),
    "gemma": ("ScalarsToNumbers",),
    "minicpm3": ("MergeFactors",),
    "opt": ("ScaleIntoAttention", "NormIntoLinear"),
    "gpt2": ("DropViews", "LinearFromMatmul"),
    "falcon": ("GroupRepeatedHeads", "RecogniseAttention", "PermuteToTranspose"),
    "falcon, alibi and bias": ("BiasIntoLinear",),
    "bloom": ("ExpandBaddbmm",),
    "mpt": ("DropCopies",),
})  # fmt: skip
"""Each rule on one model that it fires on, alone or with those that it works with."""

ON_GPU = (
    "MergeParallelLinears", "SkinnyLinears", *GLUE, *INTO_LINEARS, " + ".join((*GLUE, *INTO_LINEARS)),
    "ScaleBeforeLinear", LAYOUT, "CommonSubexpressions",
)  # fmt: skip


def checkpoint(model: str, layers: int) -> Checkpoint:
    """Random weights of that depth, written to the cache the first time."""
    kind, sizes = MODELS[model]
    directory = env.cache_dir() / "benchmarks" / f"rules-{model.replace(', ', '-').replace(' ', '-')}-{layers}"
    if not (directory / "config.json").exists():
        _write(kind(**sizes, **_depth(kind, layers)), directory)
    return Checkpoint.open(directory)


def _write(config: hf.PreTrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory.with_suffix(".tmp"))
    directory.with_suffix(".tmp").rename(directory)


def _depth(kind: type[hf.PreTrainedConfig], layers: int) -> dict[str, int]:
    """The keyword under which this configuration takes its number of layers."""
    known = {kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")}
    return {name: layers for name in LAYERS if name in known}


def llama_8b(layers: int, device: str) -> Checkpoint:
    """Layers of Llama-3.1-8B's shape in bfloat16, with a small vocabulary so that they are most of a step."""
    return RandomCheckpoint({**LLAMA_8B, "num_hidden_layers": layers, "vocab_size": 4096}, torch.bfloat16, device)
