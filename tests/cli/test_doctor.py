"""The checks of `enginery doctor` on machines that lack something, played by a torch and compilers that say so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.cpp_extension
from typer.testing import CliRunner

from enginery.cli import checks
from enginery.cli.main import app

GIB = 1 << 30


def named(name: str) -> checks.Check:
    (found,) = (check for check in checks._gpu() if check.name == name)
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine with an H100 that lacks nothing; its fields may be changed."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    facts = SimpleNamespace(capability=(9, 0), free=70 * GIB, count=1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: facts.count,
        "get_device_name": lambda: "a fake GPU",
        "get_device_capability": lambda: facts.capability,
        "get_arch_list": lambda: ["sm_70", "sm_90"],
        "mem_get_info": lambda index: (facts.free, 80 * GIB),
        "get_device_properties": lambda index: SimpleNamespace(name="a fake GPU", major=9, minor=0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return facts


def test_a_machine_that_lacks_nothing(gpu: SimpleNamespace) -> None:
    found = {check.name: check for check in checks._gpu()}
    assert not [check for check in found.values() if check.fix]
    assert found["GPU"].found == "a fake GPU, compute capability 9.0, 70.0 GiB free of 80.0 GiB"
    assert found["CUDA"].found == "driver 13.1, torch built for 13.0"
    assert "not needed" in found["nvcc"].found
    assert "optional" in found["nvidia-cudnn-frontend"].found or found["nvidia-cudnn-frontend"].found == "installed"


def test_an_old_gpu_and_a_full_one(gpu: SimpleNamespace) -> None:
    gpu.capability, gpu.free, gpu.count = (7, 0), GIB, 2
    assert "7.0" in named("GPU engine").found
    assert "--backend eager" in named("GPU engine").fix
    assert "nvidia-smi" in named("GPU 1").fix


def test_triton_that_does_not_import(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise AttributeError('no such symbol in torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert named("Triton").found == "does not import: no such symbol in torch"
    assert "the triton of this torch" in named("Triton").fix


def test_cuda_headers_are_named(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert named("CUDA headers").found == f"{tmp_path}/include"
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    assert "set CUDA_HOME" in named("CUDA headers").fix
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", "/no/toolkit")
    assert named("CUDA headers").found == "no cuda.h in /no/toolkit/include"


def test_without_a_gpu_the_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (only,) = checks._gpu()
    assert "built without CUDA" in only.found
    assert "--device cpu" in only.fix


CRASHING = """#!/bin/sh
while [ "$1" != "-o" ]; do shift; done
echo 'extern "C" int probe(const char*) { __builtin_trap(); }' | g++ -x c++ -shared -fPIC - -o "$2"
"""
FAILING = "#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (CRASHING, "its code crashes beside torch's C++ library"),
        (FAILING, "does not compile: fatal error: no such thing"),
    ],
)
def test_a_compiler_is_tried(script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("ENGINERY_CXX", str(compiler))
    found = checks._compiler()
    assert problem in found.found
    assert "ENGINERY_CXX" in found.fix


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINERY_CXX", "no-such-compiler")
    assert "no-such-compiler not found" in checks._compiler().found
    assert "--backend eager" in checks._compiler().fix


def test_the_compiler_of_other_programs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_probe_compiler", lambda path: "")
    monkeypatch.setenv("CXX", "/opt/other/g++")
    assert checks._compiler().found.endswith("(CXX=/opt/other/g++ is not used)")
    assert checks._compiler().fix == ""


def test_a_cache_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    assert "1.0 GiB free" in checks._cache().found
    assert "ENGINERY_CACHE" in checks._cache().fix


def test_too_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (256, 1 << 20))
    (found,) = (check for check in checks._machine() if check.name == "file descriptors")
    assert (found.found, found.fix) == ("256", "ulimit -n 4096")


def test_the_report_names_each_problem_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [checks.Check("disk", "full", "Buy a larger one"), checks.Check("memory", "enough")]
    monkeypatch.setattr(checks, "run_checks", lambda: iter(rows))
    text = CliRunner().invoke(app, ["doctor"]).output
    assert "disk: full\n  fix: Buy a larger one" in text
    assert "memory: enough" not in text
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert report["facts"] == {"disk": "full", "memory": "enough"}
    assert report["problems"] == [{"name": "disk", "found": "full", "fix": "Buy a larger one"}]
    assert {"op", "kernel", "reason"} == report["kernels"][0].keys()
