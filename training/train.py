"""Trains the bundled model from nothing: `python training/train.py --device cuda --seed 0 --out DIR`.

Writes an ordinary Hugging Face checkpoint (bfloat16) to DIR/checkpoint, the loss to DIR/log.txt and the accuracy of the
saved checkpoint on held-out problems to DIR/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import model as decoder
import numpy as np
import torch
from corpus import TRAINED, Packer, stream
from evaluate import evaluate_checkpoint
from numpy.typing import NDArray
from tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

PROMPT_WEIGHT = (
    0.02  # of a token that the user says: enough to learn what questions look like, too little to crowd out answers
)
SHORT, LONG, LONG_SHARE = 256, 1024, 0.15  # most steps see short rows; the last ones see rows as long as the context
WARMUP, DECAY_SHARE = 100, 0.5


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, constant, then linearly to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


def step_plan(steps: int, tokens: int) -> list[tuple[int, int]]:
    """(rows, length) of every step."""
    long_from = steps - round(steps * LONG_SHARE)
    return [(tokens // length, length) for length in (SHORT if step < long_from else LONG for step in range(steps))]


def optimizers(network: decoder.Llama, peak: float, device: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the embedding and the norms."""
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in network.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=peak, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.6 * peak, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda"),
    ]


def on_device(rows: NDArray[np.uint16], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and their weights, each (batch, length)."""
    packed = torch.from_numpy(rows.astype(np.int32))
    packed = packed.pin_memory().to(device, non_blocking=True) if device == "cuda" else packed
    tokens = (packed & (TRAINED - 1)).long()
    weights = torch.where(packed[:, 1:] >= TRAINED, 1.0, PROMPT_WEIGHT)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights


def train(
    network: decoder.Llama, packer: Packer, plan: Sequence[tuple[int, int]], options: argparse.Namespace, log: TextIO
) -> None:
    """Runs the plan. Every 50 steps the log gets step, loss, tokens per second and seconds."""
    groups = optimizers(network, options.peak, options.device)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in groups]
    began = time.perf_counter()
    seen, loss = 0, torch.zeros(())
    for step, rows in enumerate(stream(packer, plan, options.workers)):
        share = learning_rate(step, len(plan))
        for optimizer, rates in zip(groups, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = network(*on_device(rows, options.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad()
        seen += rows.shape[0] * (rows.shape[1] - 1)
        if step % 50 == 0 or step + 1 == len(plan):
            value, seconds = loss.item(), time.perf_counter() - began
            print(f"{step} loss {value:.4f} tokens/s {seen / seconds:.0f} seconds {seconds:.1f}", file=log, flush=True)


def compile_layers(network: decoder.Llama) -> None:
    """One compilation serves all layers, and one more the head with its loss."""
    for layer in network.model.layers:
        layer.compile(dynamic=False)
    network.loss = torch.compile(network.loss, dynamic=False)


def save(network: decoder.Llama, packer: Packer, directory: Path) -> None:
    """The checkpoint as transformers writes it."""
    config = network.model.config
    exported = LlamaForCausalLM(config)
    exported.load_state_dict(network.state_dict() | {"lm_head.weight": network.model.embed_tokens.weight})
    stops = [config.eos_token_id, config.pad_token_id]
    exported.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=config.pad_token_id, do_sample=False)
    exported.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(packer.tokenizer, directory, config.max_position_embeddings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--tokens", type=int, default=2**18, help="tokens per step")
    parser.add_argument("--peak", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that make text"
    )
    parser.add_argument("--count", type=int, default=200, help="held-out problems per task in the closing evaluation")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(options.seed)
    config = decoder.llama_config(tokenizer.get_vocab_size(), *map(tokenizer.token_to_id, (END_OF_TEXT, TURN_END)))
    network = decoder.Llama(config).to(options.device)
    if not options.no_compile:
        compile_layers(network)
    packer = Packer(tokenizer, options.seed)
    with open(options.out / "log.txt", "w", encoding="utf-8") as log:
        train(network, packer, step_plan(options.steps, options.tokens), options, log)

    save(network.to("cpu"), packer, options.out / "checkpoint")
    report = evaluate_checkpoint(options.out / "checkpoint", options.count, options.seed, options.device)
    (options.out / "accuracy.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print("\n".join(f"{task:16} {share:7.1%}" for task, share in report["accuracy"].items()))
    print(f"{'mean':16} {report['mean']:7.1%}")


if __name__ == "__main__":
    main()
