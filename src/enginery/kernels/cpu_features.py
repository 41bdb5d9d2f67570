"""What the CPU of this machine can do: the names that choose kernels and that compiled code is filed under."""

from __future__ import annotations

import platform
from pathlib import Path

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})


def cpu_flags() -> frozenset[str]:
    """Feature names as Linux prints them (`flags` on x86, `Features` on ARM); empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def instruction_set(flags: frozenset[str]) -> str:
    """The widest instruction set that the C++ kernels have their own code for (cpp/vec.h makes the same choice)."""
    if platform.machine() != "x86_64":
        return platform.machine()
    if flags >= _AVX512:
        return "AVX-512 with bfloat16" if "avx512_bf16" in flags else "AVX-512"
    return "AVX2" if flags >= _AVX2 else "x86-64"
