"""The compiled engine: a prefill, decoding steps and mixed batches equal the model itself and the eager engine."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.conftest import CONFIG
from tests.engine.decoder import Batcher, Decoder, random_tokens

from enginery.engine.code_cache import CodeCache, fingerprint
from enginery.engine.compile import Run
from enginery.engine.engine import Engine
from enginery.engine.steps import CompiledStep, HostStep
from enginery.errors import EngineFileError, EngineryWarning, StepError, UsageError
from enginery.network import Tensor
from enginery.ops.raised import keeping


def test_prefill_decode_and_mixed_steps_equal_the_model(compiled: Engine, model: Decoder) -> None:
    batcher = Batcher(model)
    first, second, third = (batcher.add(random_tokens(50, seed)) for seed in range(3))
    steps = [
        [(first, 20)], [(first, 1)], [(first, 1), (second, 31), (third, 1)], [(first, 1), (second, 1), (third, 1)],
        [(third, 40), (first, 1)], [(second, 2)],
    ]  # fmt: skip
    for parts in steps:
        inputs, expected = batcher.step(parts)
        logits = compiled.execute(inputs)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_compiled_equals_eager(compiled: Engine, model: Decoder) -> None:
    eager = Engine.load(compiled.directory, dataclasses.replace(CONFIG, backend="eager"))
    for seed in range(3):
        batcher = Batcher(model)
        sequence = batcher.add(random_tokens(30, seed))
        for count in (1, 17, 12):
            inputs, _ = batcher.step([(sequence, count)])
            torch.testing.assert_close(compiled.execute(inputs), eager.execute(inputs), rtol=1e-5, atol=1e-5)


def test_a_step_without_logits(compiled: Engine, model: Decoder) -> None:
    batcher = Batcher(model)
    sequence = batcher.add(random_tokens(9, 1))
    inputs, _ = batcher.step([(sequence, 5)])
    silent = dataclasses.replace(inputs, logits_indices=np.empty(0, dtype=np.int64))
    assert compiled.execute(silent).shape == (0, compiled.limits.vocab_size)
    inputs, expected = batcher.step([(sequence, 4)])
    torch.testing.assert_close(compiled.execute(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), StepError, "ran out of GPU memory: CUDA out of memory"),
        (TypeError("wrong"), StepError, "failed: wrong"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["memory", "error", "interrupt"],
)
def test_what_an_operator_raises_ends_the_step(
    compiled: Engine, model: Decoder, error: BaseException, expected: type, message: str | None, is_told: bool
) -> None:
    """Compiled code makes another error of it, or goes on without the operator's results."""
    batcher = Batcher(model)
    inputs, logits = batcher.step([(batcher.add(random_tokens(9, 1)), 5)])
    failing = [True]

    def work(fails: bool) -> None:
        if fails:
            raise error

    def fragile(run: Run) -> Run:
        def call(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
            try:
                keeping(work)(failing[0])
            except BaseException as raised:
                if is_told:
                    raise RuntimeError(f"{type(raised).__name__}: an operator failed") from None
                return [None] * 2  # type: ignore[list-item]
            return run(arguments)

        return call

    runs = {key: fragile(run) for key, run in compiled._runs.items()}
    step = CompiledStep(compiled.regions, runs, compiled._weights | compiled._pools, compiled._step_inputs)
    host = HostStep(step, [tensor.name for tensor in compiled._step_inputs])
    with pytest.raises(expected, match=message):
        host(inputs)
    failing[0] = False
    with pytest.raises(TypeError):  # elsewhere, and nobody's
        keeping(abs)("no number")
    torch.testing.assert_close(host(inputs), logits, rtol=1e-5, atol=1e-5)


def test_an_error_lets_go_of_its_tensors(compiled: Engine, model: Decoder) -> None:
    """Of the step that failed, too: where memory was missing, the next one needs it."""
    batcher = Batcher(model)
    inputs, _ = batcher.step([(batcher.add(random_tokens(9, 1)), 5)])
    held: list[weakref.ref[torch.Tensor]] = []

    def work(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("no room")

    runs = dict.fromkeys(compiled._runs, keeping(work))
    step = CompiledStep(compiled.regions, runs, compiled._weights | compiled._pools, compiled._step_inputs)
    gc.disable()
    try:
        with suppress(StepError):
            HostStep(step, [tensor.name for tensor in compiled._step_inputs])(inputs)
        with suppress(torch.OutOfMemoryError):  # outside of compiled code
            keeping(work)([])
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_values_are_let_go_when_their_last_reader_has_run(compiled: Engine, model: Decoder) -> None:
    regions, runs = compiled.regions.regions, compiled._runs
    made: dict[Tensor, weakref.ref[torch.Tensor]] = {}
    pending = iter(regions)
    seen: list[int] = []

    def spied(run: Run) -> Run:
        def call(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
            region = next(pending)
            left = {tensor for later in regions[regions.index(region) :] for tensor in later.bindings}
            alive = {tensor for tensor, value in made.items() if value() is not None}
            assert alive == made.keys() & left
            seen.append(len(made) - len(alive))
            results = run(arguments)
            made.update(zip(region.results, map(weakref.ref, results), strict=True))
            return results

        return call

    fixed = compiled._weights | compiled._pools
    spies = {key: spied(run) for key, run in runs.items()}
    step = HostStep(
        CompiledStep(compiled.regions, spies, fixed, compiled._step_inputs), [t.name for t in compiled._step_inputs]
    )
    batcher = Batcher(model)
    inputs, expected = batcher.step([(batcher.add(random_tokens(9, 1)), 5)])
    torch.testing.assert_close(step(inputs), expected, rtol=1e-5, atol=1e-5)
    assert seen == sorted(seen)
    assert seen[-1] > 1


def test_a_forked_sequence_goes_on_from_copied_blocks(compiled: Engine, model: Decoder) -> None:
    batcher = Batcher(model)
    parent = batcher.add(random_tokens(20, 5))
    inputs, _ = batcher.step([(parent, 20)])
    compiled.execute(inputs)
    child = batcher.add([*parent.tokens[:20], 7])
    child.computed = 20
    compiled.copy_blocks(list(zip(parent.blocks[:2], child.blocks[:2], strict=True)))
    inputs, expected = batcher.step([(child, 1)])
    torch.testing.assert_close(compiled.execute(inputs), expected, rtol=1e-5, atol=1e-5)


def test_regions_are_compiled_once_and_found_again(
    compiled: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = list((cache / "regions" / fingerprint("cpu")).glob("*.pt2"))
    assert {path.stem for path in packages} >= set(compiled.regions.distinct)
    monkeypatch.setattr("enginery.engine.compile.lower", refuse_to_compile)
    Engine.load(compiled.directory, CONFIG).close()


def refuse_to_compile(*args: object) -> None:
    raise AssertionError("a region was compiled again")


def test_an_engine_of_this_user_brings_its_code_along(
    compiled: Engine, cache: Path, fresh_cache: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh_cache / "regions").mkdir(parents=True, mode=0o700)
    key = (cache / "regions" / "signing-key").read_bytes()
    (fresh_cache / "regions" / "signing-key").write_bytes(key)
    (fresh_cache / "regions" / "signing-key").chmod(0o600)
    monkeypatch.setattr("enginery.engine.compile.lower", refuse_to_compile)
    engine = Engine.load(compiled.directory, CONFIG)
    inputs, expected = (batcher := Batcher(model)).step([(batcher.add(random_tokens(6, 2)), 6)])
    torch.testing.assert_close(engine.execute(inputs), expected, rtol=1e-5, atol=1e-5)


def test_code_of_somebody_else_is_compiled_again_unless_trusted(
    compiled: Engine, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginery.engine.compile.lower", refuse_to_compile)
    with pytest.raises(AssertionError):
        Engine.load(compiled.directory, CONFIG)
    Engine.load(compiled.directory, CONFIG, trust_engine_code=True).close()


def test_an_engine_compiled_elsewhere_says_so_but_not_before_a_mistake(
    compiled: Engine, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enginery.engine.engine.fingerprint", lambda device: "0123456789abcdef")
    monkeypatch.setattr("enginery.engine.compile.lower", refuse_to_compile)
    with warnings.catch_warnings(record=True) as told, pytest.raises(UsageError, match="max_model_len is 999999"):
        Engine.load(compiled.directory, dataclasses.replace(CONFIG, max_model_len=999_999))
    assert not told
    with pytest.warns(EngineryWarning, match="another machine, torch or Enginery"), pytest.raises(AssertionError):
        Engine.load(compiled.directory, CONFIG)


def test_a_cache_that_others_may_write_is_refused(compiled: Engine, fresh_cache: Path) -> None:
    cache = CodeCache(fingerprint("cpu"))
    Engine.load(compiled.directory, CONFIG, trust_engine_code=True).close()
    cache.directory.chmod(0o777)
    with pytest.raises(EngineFileError, match="may be written by others"):
        Engine.load(compiled.directory, CONFIG)
    cache.directory.chmod(0o700)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_ids", [96], "token id"),
        ("token_ids", [-1], "token id"),
        ("positions", [256], "position"),
        ("slot_mapping", [1 << 40], "slot"),
        ("block_tables", [[1 << 20]], "block"),
        ("logits_indices", [1], "logits index"),
        ("seq_lens", [17], "sequence length"),
        ("positions", [0, 1], "disagree"),
        ("query_start", [0, 2], "disagree"),
    ],
)
def test_a_batch_outside_of_the_limits_is_refused(
    compiled: Engine, field: str, value: list, message: str, model: Decoder
) -> None:
    batcher = Batcher(model)
    inputs, _ = batcher.step([(batcher.add([3]), 1)])
    inputs = dataclasses.replace(inputs, block_tables=inputs.block_tables[:, :1])
    broken = dataclasses.replace(inputs, **{field: np.array(value, dtype=getattr(inputs, field).dtype)})
    with pytest.raises(StepError, match=message):
        compiled.execute(broken)


def test_a_closed_engine_says_so(compiled: Engine, model: Decoder) -> None:
    engine = Engine.load(compiled.directory, CONFIG)
    engine.close()
    inputs, _ = (batcher := Batcher(model)).step([(batcher.add([3]), 1)])
    with pytest.raises(StepError, match="closed"):
        engine.execute(inputs)
