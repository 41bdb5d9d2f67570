"""A 24-layer Llama (hidden 1024, 0.34 B random weights) on a CPU, Enginery beside transformers in one run.

    python benchmarks/cpu_decoder.py                 # table and one JSON line
    python benchmarks/cpu_decoder.py --write         # also benchmarks/results/cpu_decoder.json

Greedy, prompts of random token ids, `ignore_eos`, no detokenisation, each measurement warmed and repeated in turn
with the other engine's, the best of the repetitions is reported.
- prefill 512: tokens/s of one prompt of 512 tokens to its first new token.
- decode, batch B: B prompts of 32 tokens; B · 32 / (time for 33 new tokens − time for 1).
- mixed 32: 32 requests at once, inputs of 32–256 tokens, outputs of 16–128; seconds until all are done.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

from enginery import LLM, SamplingParams
from models import random_llama
from record import record

Prompts = Sequence[list[int]]
Generate = Callable[[Prompts, Sequence[int]], object]
VOCABULARY = 32000


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def mixed_lengths(count: int = 32, seed: int = 1) -> tuple[list[int], list[int]]:
    generator = random.Random(seed)
    pairs = [(generator.randint(32, 256), generator.randint(16, 128)) for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def enginery(dtype: str) -> Generate:
    llm = LLM(str(random_llama()), dtype=dtype, device="cpu", max_model_len=1024, max_num_seqs=32)

    def generate(prompts: Prompts, new_tokens: Sequence[int]) -> object:
        params = [
            SamplingParams(
                max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False, skip_reading_prefix_cache=True
            )
            for n in new_tokens
        ]
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)

    return generate


def transformers_model(dtype: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_llama(), dtype=getattr(torch, dtype)).eval()


def transformers_generate(model: torch.nn.Module) -> Generate:
    def generate(prompts: Prompts, new_tokens: Sequence[int]) -> object:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens[0], min_new_tokens=new_tokens[0],
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    return generate


def transformers_batch(model: torch.nn.Module) -> Generate:
    """transformers' continuous batching, each request with a length of its own. Its block count must be given on a
    CPU."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=1024, max_batch_tokens=512)

    def generate(prompts: Prompts, new_tokens: Sequence[int]) -> object:
        manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=batching)
        manager.start()
        for prompt, count in zip(prompts, new_tokens, strict=True):
            manager.add_request(prompt, max_new_tokens=count)
        finished: list[object] = []
        while len(finished) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                finished.append(result)
        manager.stop(block=True)
        return finished

    return generate


def seconds(generate: Generate, prompts: Prompts, new_tokens: Sequence[int]) -> float:
    begin = time.perf_counter()
    generate(prompts, new_tokens)
    return time.perf_counter() - begin


def prefill_rate(generate: Generate, length: int = 512) -> float:
    return length / seconds(generate, random_prompts([length], 2), [1])


def decode_rate(generate: Generate, batch: int, new: int = 32) -> float:
    prompts = random_prompts([32] * batch, 3)
    first = seconds(generate, prompts, [1] * batch)
    return batch * new / (seconds(generate, prompts, [1 + new] * batch) - first)


MEASUREMENTS: dict[str, Callable[[Generate], float]] = {
    "prefill 512, tokens/s": prefill_rate,
    "decode batch 1, tokens/s": lambda generate: decode_rate(generate, 1),
    "decode batch 8, tokens/s": lambda generate: decode_rate(generate, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-mixed", action="store_true", help="leave out the 32 mixed requests")
    parser.add_argument("--write", action="store_true", help="keep the record in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(2)

    peers: dict[str, Generate] = {f"enginery {dtype}": enginery(dtype) for dtype in ("float32", "bfloat16")}
    peers["transformers float32"] = transformers_generate(transformers_model("float32"))
    results: dict[str, dict[str, float]] = {name: {} for name in peers}
    for generate in peers.values():
        seconds(generate, random_prompts([64], 0), [4])
    for _ in range(options.repeats):
        for name, generate in peers.items():
            for title, measure in MEASUREMENTS.items():
                results[name][title] = max(results[name].get(title, 0.0), measure(generate))
    if not options.no_mixed:
        inputs, outputs = mixed_lengths()
        prompts = random_prompts(inputs, 4)
        for name in ("enginery float32", "enginery bfloat16"):
            results[name]["mixed 32, s"] = seconds(peers[name], prompts, outputs)
        batched = transformers_batch(transformers_model("float32"))
        results["transformers float32"]["mixed 32 (generate_batch), s"] = seconds(batched, prompts, outputs)
    record("cpu_decoder", results, write=options.write)


if __name__ == "__main__":
    main()
