"""The same kernels compiled for lesser CPUs than this one, run by the same tests in a process of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from enginery.kernels import compile as compiling
from enginery.kernels.cpu_features import cpu_flags, instruction_set

HERE = Path(__file__).parent
CHECKS = [str(HERE / "test_cpu_linear.py"), str(HERE / "test_cpu_attention.py")]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="targets of x86-64")


@pytest.mark.parametrize(
    ("target", "needs"), [("x86-64-v3", "AVX2"), pytest.param("x86-64", "x86-64", marks=pytest.mark.slow)]
)
def test_kernels_for(target: str, needs: str) -> None:
    if compiling.missing_compiler():
        pytest.skip(compiling.missing_compiler())
    if needs == "AVX2" and instruction_set(cpu_flags()) == "x86-64":
        pytest.skip("this CPU has no AVX2")
    library = compiling.library((f"-march={target}",))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CHECKS],
        env={**os.environ, "KERNELS_UNDER_TEST": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "skipped" not in result.stdout
