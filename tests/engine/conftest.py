"""A cache of compiled regions that all tests of a run share, and an engine of the small decoder in it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine.decoder import Decoder, Imported, imported, reader

from enginery.engine.builder import build
from enginery.engine.config import BuildConfig
from enginery.engine.engine import Engine
from enginery.kernels.table import TABLE

CONFIG = BuildConfig(device="cpu", max_num_seqs=8, max_num_batched_tokens=64)
EAGER = BuildConfig(device="cpu", max_num_seqs=8, max_num_batched_tokens=64, backend="eager")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same directory in every worker of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return shared / "engine-cache"


@pytest.fixture(scope="session")
def in_cache(cache: Path) -> Iterator[None]:
    """ENGINERY_CACHE is that directory; the kernels are taken from the user's own cache first."""
    TABLE.load("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINERY_CACHE", str(cache))
        yield


@pytest.fixture
def fresh_cache(tmp_path: Path, in_cache: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ENGINERY_CACHE is empty."""
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path / "fresh-cache"))
    return tmp_path / "fresh-cache"


@pytest.fixture(scope="session")
def model() -> Decoder:
    return Decoder()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, cache: Path, in_cache: None, model: Decoder) -> Iterator[Engine]:
    """Built once a run: a worker that comes second finds the regions compiled."""
    cache.mkdir(exist_ok=True, mode=0o700)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = build(imported(model), reader(model), CONFIG, tmp_path_factory.mktemp("built") / "engine")
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def network_of_model(model: Decoder) -> Imported:
    """As the frontend gives it; builds take copies."""
    return imported(model)


@pytest.fixture
def source(network_of_model: Imported) -> Imported:
    return Imported(network_of_model.network.copy(), network_of_model.facts)


@pytest.fixture(scope="session")
def built_eagerly(
    tmp_path_factory: pytest.TempPathFactory, in_cache: None, model: Decoder, network_of_model: Imported
) -> Path:
    directory = tmp_path_factory.mktemp("eager") / "engine"
    source = Imported(network_of_model.network.copy(), network_of_model.facts)
    build(source, reader(model), EAGER, directory).close()
    return directory


@pytest.fixture
def eager_engine(tmp_path: Path, built_eagerly: Path) -> Path:
    """The directory of an engine that was built without compiling, for this test alone."""
    return Path(shutil.copytree(built_eagerly, tmp_path / "engine"))
