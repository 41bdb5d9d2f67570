"""How near do the CPU kernels come to the memory's rate, and how do they compare with torch's own, side by side?

    OMP_NUM_THREADS=2 python benchmarks/kernels_cpu.py [--layers 8] [--rounds 7] [--write]

The linears are those of a 24-layer Llama (hidden 1024, intermediate 2816, 16 heads, 4 KV heads of 64, vocabulary
32000). Every call takes the weights of another layer, so that they come from memory, not from the last-level cache. In
each round the pure read (of other memory of the same size), our kernel and the peers follow one another on one layer
before the next; a time is the least over layers and rounds, which a busy machine disturbs least. On a virtual machine
it matters where memory lies (the same read gave 40 to 74 GB/s), so many layers are better than few.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.nn import functional

from enginery import env, ops
from enginery.kernels.table import TABLE
from record import record

SHAPES = {"qkv": (1536, 1024), "o": (1024, 1024), "gate_up": (5632, 1024), "down": (1024, 2816)}
HEAD = (32000, 1024)
ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (512, 2048)
HEADS, KV_HEADS, SIZE, BLOCK = 16, 4, 64, 16
DECODE = ((1, 512), (1, 4096), (8, 512), (32, 300))
PREFILL = (512, 2048)

Calls = Mapping[str, Callable[[], object]]


def reader(directory: Path) -> Callable[[torch.Tensor], int]:
    library = directory / "read_bandwidth.so"
    source = Path(__file__).with_name("read_bandwidth.cpp")
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([env.read("ENGINERY_CXX"), *options, str(source), "-o", str(library)], check=True)
    read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes, read_all.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_uint64
    return lambda memory: read_all(memory.data_ptr(), memory.nbytes // 8, torch.get_num_threads())


def least_times(rounds: int, variants: list[Calls]) -> dict[str, float]:
    """The least seconds of each call, over rounds and over variants (the same calls on other data)."""
    least = dict.fromkeys(variants[0], float("inf"))
    for _ in range(rounds):
        for calls in variants:
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                least[name] = min(least[name], time.perf_counter() - begin)
    return least


def linear_calls(weight: torch.Tensor, input: torch.Tensor, read: Callable | None) -> Calls:
    packed, other = ops.pack_linear(weight), weight.clone()
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, input.shape[0])
    calls: dict[str, Callable[[], object]] = {} if read is None else {"read": lambda: read(other)}
    return calls | {
        "enginery": lambda: ops.packed_linear(input, packed, weight.shape[0]),
        "F.linear": lambda: functional.linear(input, weight),
        "oneDNN, packed": lambda: torch.ops.mkldnn._linear_pointwise(input, reordered, None, "none", [], ""),
    }


def skinny_products(dtype: torch.dtype, layers: int, rounds: int, read: Callable) -> dict[str, dict[str, float]]:
    """GB/s of weights read, per shape and for the sum of a layer's linears and a 24th of the head."""
    table = {}
    for rows in ROWS:
        total: dict[str, float] = {}
        total_bytes = 0.0
        for name, (features, depth) in {**SHAPES, "head": HEAD}.items():
            copies, share = (2, 1 / 24) if name == "head" else (layers, 1.0)
            input = torch.randn(rows, depth).to(dtype)
            weights = [torch.randn(features, depth).to(dtype) for _ in range(copies)]
            times = least_times(rounds, [linear_calls(weight, input, read) for weight in weights])
            size = features * depth * dtype.itemsize
            table[f"{name}, {rows} rows"] = {call: size / seconds / 1e9 for call, seconds in times.items()}
            total = {call: total.get(call, 0.0) + seconds * share for call, seconds in times.items()}
            total_bytes += size * share
        rates = {call: total_bytes / seconds / 1e9 for call, seconds in total.items()}
        table[f"all, {rows} rows"] = {**rates, "% of read": 100 * rates["enginery"] / rates["read"]}
    return table


def large_products(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s."""
    table = {}
    for rows in PREFILL_ROWS:
        for name, (features, depth) in SHAPES.items():
            weight, input = torch.randn(features, depth).to(dtype), torch.randn(rows, depth).to(dtype)
            times = least_times(rounds, [linear_calls(weight, input, None)])
            work = 2 * rows * features * depth
            table[f"{name}, {rows} rows"] = {call: work / seconds / 1e9 for call, seconds in times.items()}
    return table


def heads(count: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, count, SIZE).to(dtype)


def decode_calls(sequences: int, length: int, dtype: torch.dtype) -> Calls:
    blocks = -(-length // BLOCK)
    caches = [torch.randn(sequences * blocks, KV_HEADS, BLOCK, SIZE).to(dtype) for _ in range(2)]
    tables = torch.randperm(sequences * blocks).int().view(sequences, blocks)
    last = length - 1
    slots = tables[:, last // BLOCK].long() * BLOCK + last % BLOCK
    starts, lengths = torch.arange(sequences + 1).int(), torch.full((sequences,), length).int()
    new = [heads(count, sequences, dtype) for count in (HEADS, KV_HEADS, KV_HEADS)]
    dense = [torch.randn(sequences, KV_HEADS, length, SIZE).to(dtype) for _ in range(2)]
    query = new[0][:, :, None]
    return {
        "enginery, paged": lambda: ops.paged_attention(*new, *caches, slots, tables, starts, lengths, SIZE**-0.5),
        "SDPA, dense": lambda: functional.scaled_dot_product_attention(query, *dense, enable_gqa=True),
    }


def prefill_calls(tokens: int, dtype: torch.dtype) -> Calls:
    ours = [heads(count, tokens, dtype) for count in (HEADS, KV_HEADS, KV_HEADS)]
    theirs = [tensor.transpose(0, 1)[None].contiguous() for tensor in ours]
    return {
        "enginery": lambda: ops.attention(*ours, SIZE**-0.5),
        "SDPA": lambda: functional.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True),
    }


def attention(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """GB/s of keys and values for decoding, GFLOP/s of the causal half for prefill."""
    table = {}
    for sequences, length in DECODE:
        size = 2 * sequences * length * KV_HEADS * SIZE * dtype.itemsize
        copies = max(1, (48 << 20) // size)
        times = least_times(rounds, [decode_calls(sequences, length, dtype) for _ in range(copies)])
        rates = {call.split(",")[0]: size / seconds / 1e9 for call, seconds in times.items()}
        table[f"decode {sequences} × {length}, GB/s"] = rates
    for tokens in PREFILL:
        work = 2 * HEADS * 2 * SIZE * tokens * (tokens + 1) / 2
        times = least_times(rounds, [prefill_calls(tokens, dtype)])
        table[f"prefill {tokens}, GFLOP/s"] = {call: work / seconds / 1e9 for call, seconds in times.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=8, help="copies of each weight; all must exceed the last-level cache"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    TABLE.load("cpu", print)
    print(TABLE)
    with tempfile.TemporaryDirectory() as directory:
        read = reader(Path(directory))
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            results = skinny_products(dtype, arguments.layers, arguments.rounds, read)
            record(f"kernels_cpu_linear_{name}", results, write=arguments.write)
            record(f"kernels_cpu_gemm_{name}", large_products(dtype, arguments.rounds), write=arguments.write)
            record(f"kernels_cpu_attention_{name}", attention(dtype, arguments.rounds), write=arguments.write)


if __name__ == "__main__":
    main()
