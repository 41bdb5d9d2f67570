"""Compiling on first use, the cache it goes to, and the table that chooses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.kernels.cpu import require_kernels

from enginery.errors import BuildError
from enginery.kernels import compile as compiling
from enginery.kernels.cpu_features import instruction_set
from enginery.kernels.table import CPP, TABLE, KernelTable
from enginery.ops import OPS

FAKE_COMPILER = """#!/bin/sh
# A compiler that is quick: it writes its arguments to the file after -o.
for last; do :; done
all="$*"
while [ "$1" != "-o" ]; do shift; done
echo "$all" > "$2"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    compiler = tmp_path / "compiler"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("ENGINERY_CXX", str(compiler))
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_a_library_is_compiled_once_and_only_its_owner_may_enter(cache: Path) -> None:
    reports: list[str] = []
    library = compiling.library(("-mfirst",), reports.append)
    assert compiling.library(("-mfirst",), reports.append) == library
    assert len(reports) == 1
    assert "compiler" in reports[0]
    assert compiling.library(("-msecond",), reports.append) != library
    assert len(reports) == 2
    for path in (cache, library.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []
    assert "-shared" in library.read_text()


def test_a_slower_process_takes_the_result_of_the_faster(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_now = compiling._compile

    def compile_while_another_does(compiler: Path, target: tuple[str, ...], scratch: Path, output: Path) -> None:
        monkeypatch.setattr(compiling, "_compile", compile_now)
        first = compiling.library(target)
        first.write_text("the faster one")
        compile_now(compiler, target, scratch, output)

    monkeypatch.setattr(compiling, "_compile", compile_while_another_does)
    assert compiling.library().read_text() == "the faster one"


def test_code_that_others_could_have_written_is_refused(cache: Path) -> None:
    library = compiling.library()
    for path in (library, library.parent, cache):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(BuildError, match="written by others"):
            compiling.library()
        path.chmod(mode)
    assert compiling.library() == library
    moved = library.with_name("elsewhere.so")
    library.rename(moved)
    library.symlink_to(moved)
    with pytest.raises(BuildError, match="symbolic link"):
        compiling.library()


def test_a_failed_compilation_says_why_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Path(os.environ["ENGINERY_CXX"])
    compiler.write_text("#!/bin/sh\necho note\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    with pytest.raises(BuildError, match=r"x\.cpp:1: error: no such thing"):
        compiling.library()
    assert list(cache.iterdir()) == []


def test_without_a_compiler_the_references_run_and_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CXX", "no-such-compiler")
    monkeypatch.setattr("enginery.kernels.table._is_loaded", lambda op, device: False)
    rows = TABLE.load("cpu")
    assert {row.kernel for row in rows} == {"reference"}
    assert "no-such-compiler" in next(row for row in rows if row.op == "packed_linear").reason
    assert "ENGINERY_CXX" in str(TABLE)


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginery.kernels.table._is_loaded", lambda op, device: False)
    row = next(row for row in TABLE.load("cpu") if row.op == "packed_linear")
    assert row.kernel == "reference"
    assert "do not load" in row.reason


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_loading_twice_does_nothing_and_all_cpu_ops_have_kernels() -> None:
    require_kernels()
    reports: list[str] = []
    rows = TABLE.load("cpu", reports.append)
    assert reports == []
    assert {row.op for row in rows if row.kernel != "reference"} >= CPP.ops
    assert {row.op for row in rows} == {op.name for op in OPS}
    for row in rows:
        assert row.op in str(TABLE)


def test_torch_and_the_kernels_share_one_openmp_runtime() -> None:
    require_kernels()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1


def test_an_empty_table_is_references() -> None:
    assert {row.kernel for row in KernelTable(()).rows("cpu")} == {"reference"}


def test_every_kernel_is_of_an_op() -> None:
    ops = {op.name for op in OPS}
    assert [candidate.ops - ops for candidate in TABLE.candidates] == [frozenset(), frozenset()]


def test_the_instruction_set_follows_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    expected = {
        "x86-64": set(),
        "AVX2": avx2,
        "AVX-512": avx512,
        "AVX-512 with bfloat16": avx512 | {"avx512_bf16"},
    }
    for name, flags in expected.items():
        assert instruction_set(frozenset(flags)) == name
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert instruction_set(frozenset({"asimd"})) == "aarch64"
