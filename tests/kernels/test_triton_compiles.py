"""The Triton kernels compile for a GPU that is not here: what the interpreter takes, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = (
    "add_and_normalise apply_scales argmax_rows attend_few attend_long attend_prompts attend_short gate linear_gated "
    "linear_row linear_rows linear_tiles quantise write_cache"
)


@pytest.mark.parametrize("which", [["--few"], pytest.param([], marks=pytest.mark.slow)], ids=["few", "all"])
def test_compiles_for_hopper(which: list[str], tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script), *which], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == KERNELS
