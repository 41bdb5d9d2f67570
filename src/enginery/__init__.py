"""Enginery: bring a network, see and rewrite its graph, build an engine, run it.

Names are loaded on first use, so that `import enginery` costs milliseconds, not the import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginery.engine.config import BuildConfig
    from enginery.engine.engine import Engine
    from enginery.graph_rewriting import optimize
    from enginery.llm import LLM, build
    from enginery.network.network import Network
    from enginery.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "BuildConfig", "Engine", "Network", "SamplingParams", "build", "optimize"]

_HOME = {
    "LLM": "enginery.llm",
    "BuildConfig": "enginery.engine.config",
    "Engine": "enginery.engine.engine",
    "Network": "enginery.network.network",
    "SamplingParams": "enginery.runtime.sampling_params",
    "build": "enginery.llm",
    "optimize": "enginery.graph_rewriting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'enginery' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
