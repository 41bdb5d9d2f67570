"""Compiles our Triton kernels for compute capability 9.0 without a GPU, as the shapes of an 8B decoder call them.

Triton's interpreter, in which the kernels are tested elsewhere, takes much that its compiler does not: values that
change their shape, branches that disagree, tiles beyond the shared memory. Run by `test_triton_compiles.py` in a
process of its own, for one that has interpreted kernels cannot compile them.
"""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from enginery.kernels.triton import fused_linear, greatest, paged_attention
from enginery.kernels.triton.cublas import Cublas
from enginery.kernels.triton.gpu import H200_SHARED_MEMORY, Gpu

TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
HOPPER = GPUTarget("cuda", 90, 32)
GPU = Gpu(132, (9, 0))
compiled: dict[Any, Any] = {}


def compile_call(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands for a launch: compiles what would run."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        signature[parameter.name] = "constexpr"
        if parameter.is_constexpr or value is None:
            constants[place,] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<bf16{list(value.block_shape)}>"
        elif isinstance(value, HopperDescriptor):
            dtype = TYPES[value.base.dtype].lstrip("*")
            signature[parameter.name] = f"tensordesc<{dtype}{list(value.block_shape)},{value.layout!r}>"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
            aligned[place,] = [["tt.divisibility", 16]]
    key = (kernel, str(signature), str(constants), str(aligned), str(options))
    if key in compiled:
        return
    gluon = kernel.is_gluon()
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, constexprs=constants, attrs=aligned)
    with redirect_stdout(io.StringIO()) as log:
        code = triton.compile(source, target=HOPPER, options=options)
    assert code.metadata.shared <= H200_SHARED_MEMORY, (kernel.__name__, constants, code.metadata.shared)
    if gluon:
        assert "registers" in log.getvalue()
        assert "serialized" not in log.getvalue(), log.getvalue()
        CHECKS[kernel.__name__](code.metadata, disassemble(code.asm["cubin"]), log.getvalue())
    if "wgmma" in code.asm["ptx"] and not gluon:
        check_uniform_registers(disassemble(code.asm["cubin"]))
    compiled[key] = code


def disassemble(binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z0-9_.]+)\s*(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
WRITERS = ("U", "R2UR", "S2UR", "CS2UR", "REDUX", "VOTEU", "ELECT")
"""beginnings of the names of instructions whose first uniform register is a result; of tensor copies none is"""


def check_uniform_registers(code: str) -> None:
    """None is read that nothing can have written before, as ptxas may do with descriptors (`plan_launch`)."""
    parts = LABEL.split(code[code.index("/*0000*/") :])
    blocks = {name: INSTRUCTION.findall(text) for name, text in zip(["", *parts[1::2]], parts[::2], strict=True)}
    names = list(blocks)
    before: dict[str, set[str]] = {name: set() for name in names}
    changed = True
    while changed:
        changed = False
        for name, following in zip(names, [*names[1:], ""], strict=True):
            written, goes_on = set(before[name]), True
            for condition, instruction, operands in blocks[name]:
                written |= results(instruction, operands)
                targets = re.findall(r"\.L_x_\d+", operands)
                goes_on = bool(condition or operands.count(",")) or instruction not in ("BRA", "EXIT", "RET")
                for target in targets + [following] * (goes_on and bool(following)):
                    changed |= not before[target].issuperset(written)
                    before[target] |= written
                if not goes_on:
                    break
    for name in names:
        written = set(before[name])
        for _, instruction, operands in blocks[name]:
            found = results(instruction, operands)
            read = re.findall(r"UR\d+", operands)[bool(found) :]
            if not instruction.startswith("HGMMA"):  # names the first of four
                assert written.issuperset(read), (name, instruction, operands)
            written |= found


def results(instruction: str, operands: str) -> set[str]:
    """The uniform registers that it writes."""
    first = re.match(r"(?:U?P\w+, )*UR(\d+)", operands)
    if first is None or not instruction.startswith(WRITERS) or instruction.startswith("UTMA"):
        return set()
    count = 4 if ".128" in instruction else 2 if ".64" in instruction or ".WIDE" in instruction else 1
    return {f"UR{number}" for number in range(int(first[1]), int(first[1]) + count)}


def check_overlap(_metadata: Any, code: str, _log: str) -> None:
    """ptxas left the products asynchronous, and the softmax where it is written: in each step, while P·V runs.

    Two warpgroups have a loop over masked steps and one over clear ones each. A step starts both products, waits for
    the first (all but 1 are done), takes 64 exponentials a thread for the weights, and waits for the second.
    """
    assert "HGMMA" in code
    steps = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", code, re.DOTALL)
    exponentials = [step.count("MUFU.EX2") for step in steps]
    assert len(steps) == 4, exponentials
    assert min(exponentials) >= 64, exponentials


EVENTS = {"UTMALDG": "c", "ACQBULK": "w", "PREEXIT": "n", "GMMA": "p", "STG": "s"}
"""copies, waits for the kernel ahead, lets the next one in, products, stores"""


def check_stream(metadata: Any, code: str, log: str) -> None:
    """Two programs share a multiprocessor, their sums in registers. One warp copies weights before it waits, and lets
    the next kernel in behind its last copies. The others wait before they store, and start a product before they wait
    for the one before."""
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, log
    [registers] = map(int, re.findall(r"Used (\d+) registers", log))
    assert 2 * metadata.num_warps * 32 * registers <= 65536, registers
    assert 2 * (metadata.shared + 1024) <= 228 << 10, metadata.shared
    events = "".join(EVENTS[event] for event in re.findall("|".join(EVENTS), code))
    assert re.fullmatch(r"(cc){2,}wc{2,}(ccc)?nwp+s+", events), events
    assert "DEPBAR.LE gsb0, 0x1" in code


def check_row(metadata: Any, code: str, log: str) -> None:
    """Two programs share a multiprocessor. One warp lets the next kernel in and copies weights without waiting for
    anybody; the others wait before they load or store anything."""
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, log
    [registers] = map(int, re.findall(r"Used (\d+) registers", log))
    assert 2 * metadata.num_warps * 32 * registers <= 65536, registers
    assert 2 * (metadata.shared + 1024) <= 228 << 10, metadata.shared
    names = EVENTS | {"LDG": "l"}
    events = "".join(names[event] for event in re.findall("UTMALDG|ACQBULK|PREEXIT|STG|LDG", code))
    assert re.fullmatch(r"nc+wl[ls]*s", events), events


def check_pages(metadata: Any, code: str, log: str) -> None:
    """Eight programs share a multiprocessor. They wait for the kernel ahead before they load or copy anything, and ask
    for the first pages before queries; pages are still on their way while others are multiplied."""
    assert max(map(int, re.findall(r"(\d+) bytes spill", log))) <= 64, log
    assert 8 * (metadata.shared + 1024) <= 228 << 10, metadata.shared
    names = {"PREEXIT": "n", "ACQBULK": "w", "LDGSTS": "c", "LDG.E.128": "q", "HMMA": "p"}
    events = "".join(names[event] for event in re.findall(r"PREEXIT|ACQBULK|LDGSTS|LDG\.E\.128|HMMA", code))
    assert re.match(r"nw(c{16}){2}q+[cp]", events), events
    assert "DEPBAR.LE SB0, 0x1" in code


CHECKS = {
    "attend_few": check_pages,
    "attend_prompts": check_overlap,
    "linear_gated": check_stream,
    "linear_row": check_row,
}


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    tokens: int, sequences: int, columns: int, *, sizes: tuple[int, int] = (128, 128), heads: int = 32,
    kv_heads: int = 8, rotary: bool = True, general: bool = False, **options: Any,
) -> None:  # fmt: skip
    """`sizes`: of the heads of keys and values; `general`: by the kernels for any GPU."""
    dk, dv = sizes
    fused = make(tokens, heads * dk + kv_heads * (dk + dv)).split([heads * dk, kv_heads * dk, kv_heads * dv], 1)
    parts = [part.unflatten(1, (-1, size)) for part, size in zip(fused, (dk, dk, dv), strict=True)]
    pools = (make(99, kv_heads, 16, dk), make(99, kv_heads, 16, dv))
    numbers = [make(n, dtype=torch.int32) for n in (sequences + 1, sequences)]
    tables = (make(tokens, dtype=torch.int64), make(sequences, columns, dtype=torch.int32), *numbers)
    if rotary:
        options["angles"] = (make(tokens, dk), make(tokens, dk))
    if general:
        plan = paged_attention.plan_launch(GPU, tokens, sequences, columns * 16, kv_heads, heads // kv_heads, dk, 2)
        options["plan"] = replace(plan, hopper_programs=0)
    arrivals = make(1 << 16, dtype=torch.int32)
    paged_attention.paged_attention(*parts, *pools, *tables, 0.1, **options, arrivals=arrivals)


def check_sizes(sizes: Sequence[tuple[int, int]], **options: Any) -> None:
    """Prompts beside decoding, heads of keys and values of these sizes."""
    for each in sizes:
        attend(300, 200, 512, sizes=each, **options)


def check_attention(steps: Sequence[tuple[int, int, int]]) -> None:
    """Of (tokens, sequences, columns of the block tables)."""
    for tokens, sequences, columns in steps:
        attend(tokens, sequences, columns)
        attend(tokens, sequences, columns, general=True)
    attend(64, 64, 512, rotary=False, window=100, softcap=30.0)
    attend(900, 64, 512, window=100, sinks=make(32), alibi_slopes=make(32, dtype=torch.float32))


@patch.object(fused_linear, "hopper_row", None)
def check_linears(numbers: Sequence[int]) -> None:
    """Of so many rows; one as on other GPUs."""
    cublas = Cublas()
    for rows, dtype in itertools.product(numbers, (torch.bfloat16, torch.float8_e4m3fn)):
        narrow = dtype.itemsize == 1
        for features, depth in ((6144, 4096), (4096, 4096), (4096, 14336)):
            scale = make(features, dtype=torch.float32) if narrow else None
            fused_linear.linear(make(rows, depth), make(features, depth, dtype=dtype), None, scale, cublas=cublas)
        scale = make(1, dtype=torch.float32) if narrow else None
        fused_linear.linear(make(rows, 4096), make(4096, 4096, dtype=dtype), make(4096), scale, cublas=cublas)
        for features, gated in ((6144, False), (28672, True)):
            scale = make(features, dtype=torch.float32) if narrow else None
            operands = (make(rows, 4096), make(rows, 4096), make(4096), 1e-5, make(features, 4096, dtype=dtype))
            fused_linear.norm_linear(*operands, None, scale, gated, cublas=cublas)


def check_gated(numbers: Sequence[int]) -> None:
    """Of so many rows, with a bias, an odd number of features, and one scale."""
    for rows, dtype in itertools.product(numbers, (torch.bfloat16, torch.float8_e4m3fn)):
        scales = {}
        if dtype.itemsize == 1:
            scales = {"scale": make(1, dtype=torch.float32), "input_scale": make(rows, dtype=torch.float32)}
        fused_linear.hopper_gated.gated_linear(
            make(rows, 4096, dtype=dtype), make(2 * 8455, 4096, dtype=dtype), make(2 * 8455), **scales
        )


def check_rows(depths: Sequence[int]) -> None:
    """Of one row, for Hopper."""
    for depth, dtype in itertools.product(depths, (torch.bfloat16, torch.float8_e4m3fn)):
        weight = make(2 * 8455, depth, dtype=dtype)
        scale = make(2 * 8455, dtype=torch.float32) if dtype.itemsize == 1 else None
        fused_linear.hopper_row.row_linear(make(1, depth), weight, None, scale)
        fused_linear.hopper_row.norm_row_linear(
            make(1, depth), make(1, depth), make(depth), 1e-5, weight, make(2 * 8455), scale, gated=True
        )


def check_greatest(vocabularies: Sequence[int]) -> None:
    for size, dtype in itertools.product(vocabularies, (torch.float32, torch.bfloat16)):
        greatest.greatest(make(64, size, dtype=dtype))


def main(few: bool) -> None:
    JITFunction.run = compile_call  # type: ignore[method-assign]
    Gpu.of = classmethod(lambda cls, device: GPU)  # type: ignore[method-assign,assignment]
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    torch._scaled_mm = lambda a, b, *_, **__: make(a.shape[0], b.shape[1])  # type: ignore[assignment]
    check_greatest((50257, 128256))
    if few:
        check_attention(((1, 1, 32), (300, 200, 512), (512, 1, 32)))
        check_sizes(((20, 16), (96, 64)), heads=4, kv_heads=2, rotary=False)
        check_sizes(((36, 20),), heads=2, kv_heads=1)
        check_linears((1, 128, 256))
        check_rows((4096,))
    else:
        decoding = ((1, 1, 32), (1, 1, 2048), (8, 8, 32), (32, 32, 128), (48, 48, 512), (256, 256, 512))
        check_attention((*decoding, (300, 256, 512), (512, 32, 128), (8192, 1, 512)))
        sizes = ((20, 16), (36, 16), (60, 28), (64, 64), (80, 80), (96, 64), (192, 128), (256, 256))
        check_sizes(sizes, heads=4, kv_heads=2, rotary=False)
        for heads, kv_heads in ((2, 1), (3, 1), (6, 3)):
            check_sizes(((20, 20), (36, 16), (36, 20), (64, 64)), heads=heads, kv_heads=kv_heads)
        check_linears((1, 3, 16, 32, 64, 128, 256))
        check_gated((64, 128))
        check_rows((512, 4096, 5120, 8192, 14336))
    print(*sorted({kernel.__name__ for kernel, *_ in compiled}))


if __name__ == "__main__":
    main("--few" in sys.argv)
