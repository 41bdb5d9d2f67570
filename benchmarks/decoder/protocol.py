"""What is measured, in which sizes, and what others reach. Without torch: the process that collects needs none.

Greedy, `ignore_eos`, prompts of random token ids, no detokenisation, prefix cache off; each arm is warmed up and the
best of two runs counts.
- decode, batch B: B prompts of 128 tokens; (time for 129 new tokens − time for 1) / 128.
- decode, context 8192: prompts of 8192 tokens; (time for 65 new tokens − time for 1) / 64.
- prefill n × B: B prompts of n tokens; time to all first tokens.
- mixed: 1,000 requests, all submitted at once as a batch, at most 256 running; output tokens / wall time.
- mixed, as they came: the same requests one by one, as a server gets them: no longest ones first; one run.
- start: a fresh process, from the constructor to ready, imports apart, from the built engine in the page cache;
  bare: the same with empty caches of compiled code, as on a machine that has just received the engine.
- build: from the imported packages to an engine that is written and open; weights are drawn, not read from a disk.
- steps: the mixed load served twice; of the second time, what each kind of step takes on the device.
- host: seconds of the session beside the engine in a step of 256 sequences, and the part of a step in which the device
  waits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GROUPS = (
    "ceilings", "build", "decode", "context", "prefill", "mixed", "host", "steps", "profile", "start", "bare",
    "transformers", "vllm",
)  # fmt: skip
SLOW_GROUPS = frozenset({"steps", "profile", "bare"})
"""run only on request"""
DTYPES = ("bf16", "fp8")
MEASURED_BY_WORKER = ("build", "ceilings", "decode", "prefill", "context", "host", "mixed", "steps", "profile")
"""The groups that share one open engine, in their order."""

ARRIVALS = "mixed, as they came"
FIRST_START, SECOND_START, BARE_START = "start", "start, again", "start, empty caches"
STARTS = {"start": (FIRST_START, SECOND_START), "bare": (BARE_START,)}


@dataclass(frozen=True)
class Arm:
    """One measurement: `batch` prompts of `length` tokens, `new` tokens each."""

    group: str
    name: str
    unit: str
    batch: int = 1
    length: int = 0
    new: int = 1


@dataclass(frozen=True)
class Sizes:
    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    decode_length: int = 128
    decode_new: int = 129
    context_batches: tuple[int, ...] = (1, 16)
    context: int = 8192
    context_new: int = 65
    prefills: tuple[tuple[int, int], ...] = ((1024, 1), (8192, 1), (1024, 32))
    requests: int = 1000
    longest_input: int = 2048
    longest_output: int = 1024
    max_num_seqs: int = 256
    max_model_len: int = 8320
    profile_batches: tuple[int, ...] = (1, 32, 256)
    profile_prefills: tuple[int, ...] = (1024, 8192)
    peer_batches: tuple[int, ...] = (1, 32)

    def arms(self, group: str) -> list[Arm]:
        if group == "decode":
            return [
                Arm(group, f"decode, batch {batch}", "ms/step", batch, self.decode_length, self.decode_new)
                for batch in self.decode_batches
            ]
        if group == "context":
            return [
                Arm(
                    group,
                    f"decode, context {self.context}, batch {batch}",
                    "ms/step",
                    batch,
                    self.context,
                    self.context_new,
                )
                for batch in self.context_batches
            ]
        if group == "prefill":
            return [Arm(group, f"prefill {length} × {batch}", "ms", batch, length) for length, batch in self.prefills]
        if group == "profile":
            batches = [batch for batch in self.profile_batches if batch in self.decode_batches]
            decode = [
                Arm(group, f"profile, decode, batch {batch}", "ms/step", batch, self.decode_length) for batch in batches
            ]
            prefill = [Arm(group, f"profile, prefill {length}", "ms", 1, length) for length in self.profile_prefills]
            return [*decode, *prefill]
        if group == "transformers":
            decode = [arm for arm in self.arms("decode") if arm.batch in self.peer_batches]
            return [*decode, *self.arms("mixed")[:1]]
        if group == "vllm":
            alike = [arm for name in ("decode", "context", "prefill", "mixed") for arm in self.arms(name)]
            return [arm for arm in alike if arm.name != ARRIVALS]
        if group == "mixed":
            return [Arm(group, name, "output tokens/s") for name in ("mixed", ARRIVALS)]
        units = {"ceilings": "TB/s", "build": "s", "host": "ms/step", "steps": "s"}
        if group in units:
            return [Arm(group, group, units[group], self.decode_batches[-1], self.decode_length)]
        return [Arm(group, name, "s") for name in STARTS[group]]

    def mixed(self) -> list[tuple[int, int]]:
        """(input, output) tokens of each request."""
        generator = random.Random(1)

        def length(mean: float, deviation: float, longest: int) -> int:
            return min(longest, max(4, int(generator.lognormvariate(mean, deviation))))

        return [
            (length(4.9, 1.1, self.longest_input), length(4.9, 0.9, self.longest_output)) for _ in range(self.requests)
        ]


TINY_SIZES = Sizes(
    decode_batches=(1, 4),
    decode_length=8,
    decode_new=5,
    context_batches=(1,),
    context=40,
    context_new=3,
    prefills=((16, 1), (16, 2)),
    requests=6,
    longest_input=24,
    longest_output=8,
    max_num_seqs=4,
    max_model_len=64,
    profile_batches=(1,),
    profile_prefills=(16, 40),
    peer_batches=(1,),
)
"""For a processor and a test: everything runs, nothing is worth reading."""


@dataclass(frozen=True)
class Target:
    """What vLLM 0.24.0 reached on an H200 with torch 2.11.0+cu130 and FlashAttention 3, and what we aim at."""

    vllm: float | None
    goal: float | None


TARGETS: dict[tuple[str, str], Target] = {
    ("bf16", "decode, batch 1"): Target(4.87, 4.1),
    ("bf16", "decode, batch 8"): Target(4.98, None),
    ("bf16", "decode, batch 32"): Target(5.48, 4.7),
    ("bf16", "decode, batch 64"): Target(6.05, None),
    ("bf16", "decode, batch 128"): Target(7.25, 6.0),
    ("bf16", "decode, batch 256"): Target(10.92, 9.0),
    ("bf16", "decode, context 8192, batch 1"): Target(5.15, 4.4),
    ("bf16", "decode, context 8192, batch 16"): Target(9.44, 8.8),
    ("bf16", "prefill 1024 × 1"): Target(26.2, 26.0),
    ("bf16", "prefill 8192 × 1"): Target(209.8, 205.0),
    ("bf16", "prefill 1024 × 32"): Target(757.0, None),
    ("bf16", "mixed"): Target(10140.0, 12500.0),
    ("bf16", ARRIVALS): Target(10140.0, None),
    ("fp8", "decode, batch 1"): Target(3.47, 2.5),
    ("fp8", "decode, batch 8"): Target(3.59, None),
    ("fp8", "decode, batch 32"): Target(4.57, 3.2),
    ("fp8", "decode, batch 64"): Target(4.52, None),
    ("fp8", "decode, batch 128"): Target(5.72, None),
    ("fp8", "decode, batch 256"): Target(8.71, 6.5),
    ("fp8", "decode, context 8192, batch 1"): Target(3.77, None),
    ("fp8", "decode, context 8192, batch 16"): Target(7.80, None),
    ("fp8", "prefill 1024 × 1"): Target(17.4, None),
    ("fp8", "prefill 8192 × 1"): Target(141.1, None),
    ("fp8", "prefill 1024 × 32"): Target(473.8, None),
    ("fp8", "mixed"): Target(12791.0, 17000.0),
    ("fp8", ARRIVALS): Target(12791.0, None),
    ("bf16", FIRST_START): Target(57.0, 10.0),
    ("fp8", FIRST_START): Target(57.2, 10.0),
    ("bf16", "build"): Target(None, 90.0),
    ("fp8", "build"): Target(None, 90.0),
    ("bf16", "host"): Target(None, 1.0),
    ("fp8", "host"): Target(None, 1.0),
}
