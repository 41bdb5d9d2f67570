"""What is done to the C++ of a region before it is compiled, and what a user is told where nothing can be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import CONFIG
from tests.engine.decoder import Decoder, Imported, reader

from enginery.engine import native
from enginery.engine.builder import build
from enginery.engine.code_cache import CodeCache
from enginery.engine.compile import example_inputs
from enginery.engine.native import PARALLEL_ROWS, RegionSources, Unit, serial_when_small, split_source
from enginery.errors import BuildError, ResourceError
from enginery.network import Dim, Network

HOST = 'extern "C"  void  cpp_fused_a(const float* x,\n    const int64_t ks0);\nvoid run() {}\n'
ONE = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  cpp_fused_a(const float* x,
                       const int64_t ks0)
{
    #pragma omp parallel
    {
    }
    #pragma omp parallel num_threads(2)
    {
    }
}
"""
TWO = ONE.replace("cpp_fused_a", "cpp_fused_b").replace("ks0)", "ks0,\n const int64_t ks1)")


INTERFACE = "#include <interface.h>\n\n#include <string>\nvoid load() {}"


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_interface", lambda: INTERFACE)


def test_host_code_and_kernels_are_separated(interface: None) -> None:
    assert split_source(HOST + ONE) == ("", HOST, ONE)


def test_the_interface_is_separated_and_the_host_code_has_its_headers(interface: None) -> None:
    head = "#include <cpu.h>\n"
    model = "template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;\n"
    assert split_source(f"{head}{INTERFACE}\n{HOST}{ONE}") == (
        f"{head}{INTERFACE}\n{model}",
        f"{head}#include <interface.h>\n#include <string>\nextern {model}\n{HOST}",
        ONE,
    )


def test_a_file_that_is_laid_out_differently_stays_whole(interface: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_source(HOST) == ("", HOST, "")
    assert split_source("void run() {}\n" + ONE) == ("", "void run() {}\n" + ONE, "")
    changed = INTERFACE.replace("load", "open")
    assert split_source(changed + HOST + ONE) == ("", changed + HOST, ONE)
    monkeypatch.setattr(native, "_interface", lambda: "")
    assert split_source(INTERFACE + HOST + ONE) == ("", INTERFACE + HOST, ONE)


def test_kernels_over_few_rows_start_no_threads() -> None:
    changed = serial_when_small(ONE)
    assert changed.count(f"if(ks0 >= {PARALLEL_ROWS})") == 2
    assert f"#pragma omp parallel num_threads(2) if(ks0 >= {PARALLEL_ROWS})\n" in changed
    assert changed.replace(f" if(ks0 >= {PARALLEL_ROWS})", "") == ONE


def test_a_kernel_over_several_sizes_is_left_alone() -> None:
    assert serial_when_small(TWO) == TWO
    assert serial_when_small(ONE + TWO) == serial_when_small(ONE) + TWO
    assert serial_when_small("no kernel") == "no kernel"


def test_sources_of_an_unknown_form_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"0 files \.wrapper\.cpp"):
        RegionSources([tmp_path / "other.cpp"])


def test_without_a_compiler_the_fix_is_named(
    fresh_cache: Path, tmp_path: Path, source: Imported, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINERY_CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="--backend eager") as caught:
        build(source, reader(model), CONFIG, tmp_path / "engine")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "engine").exists()


def test_a_compiler_that_fails_is_quoted(
    fresh_cache: Path, tmp_path: Path, source: Imported, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setattr("enginery.engine.native.compiler", lambda: str(broken))
    with pytest.raises(BuildError, match="out of luck"):
        build(source, reader(model), CONFIG, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir() if "engine" in path.name] == []


def test_the_interface_is_compiled_once_for_all_regions_and_kept(
    fresh_cache: Path, tmp_path: Path, source: Imported, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_units = native.compile_units

    def counted(units: Sequence[Unit], directory: Path) -> list[Path]:
        compiled.extend(unit.name for unit in units)
        return compile_units(units, directory)

    monkeypatch.setattr("enginery.engine.native.compile_units", counted)
    monkeypatch.setattr("enginery.engine.compile.compile_units", counted)
    again = Imported(source.network.copy(), source.facts)
    build(source, reader(model), CONFIG, tmp_path / "engine").close()
    assert sorted(compiled) == ["host"] * 3 + ["interface"] + ["kernels"] * 3
    next(fresh_cache.rglob("*.pt2")).unlink()
    compiled.clear()
    build(again, reader(model), CONFIG, tmp_path / "again").close()
    assert sorted(compiled) == ["host", "kernels"]


def test_an_object_file_that_was_cut_off_is_not_linked(fresh_cache: Path, tmp_path: Path) -> None:
    cache = CodeCache("0" * 16)
    with cache.scratch() as directory:
        finished = Path(directory) / "interface.o"
        finished.write_bytes(b"machine code")
        kept = cache.publish_object("key", finished)
    assert cache.find_object("key") == kept
    assert cache.find_object("k") is None
    kept.write_bytes(b"")
    assert cache.find_object("key") is None


def test_examples_have_the_networks_sizes() -> None:
    network = Network()
    tokens, blocks = Dim.symbol("tokens"), Dim.symbol("num_blocks")
    network.add_input("ids", (tokens,), torch.int64)
    network.add_input("hidden", (1, tokens, 4), torch.float32)
    network.add_input("double", (tokens * 2, blocks), torch.bfloat16)
    examples, shapes = example_inputs(network, torch.device("cpu"))
    (count,) = examples[0].shape
    assert [list(example.shape) for example in examples[1:]] == [[1, count, 4], [2 * count, examples[2].shape[1]]]
    assert count not in (0, 1, examples[2].shape[1])
    assert shapes[0][0] is shapes[1][1]
    assert [example.dtype for example in examples] == [torch.int64, torch.float32, torch.bfloat16]
