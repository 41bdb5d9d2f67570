"""The import law of `docs/layout.md`, read from the source with `ast`: who may know whom, and what no module may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "enginery"

MAY_IMPORT = {
    "errors": set(),
    "env": {"errors"},
    "device_facts": {"env", "errors"},
    "private_files": {"errors"},
    "ops": {"errors", "env"},
    "kernels": {"ops", "device_facts", "private_files", "errors", "env"},
    "checkpoint": {"errors"},
    "network": {"ops", "errors", "env"},
    "frontends": {"network", "checkpoint", "ops", "errors", "env"},
    "rewriting": {"network", "ops", "errors", "env"},
    "analysis": {"rewriting", "network", "ops", "device_facts", "errors", "env"},
    "graph_rewriting": {"rewriting", "network", "ops", "errors", "env"},
    "quantization": set(),
    "engine": {"kernels", "quantization", "rewriting", "network", "ops", "private_files", "errors", "env"},
    "runtime": {"engine.protocol", "ops", "errors", "env"},
    "prompts": {"checkpoint", "runtime", "errors"},
    "llm": {
        "prompts",
        "frontends",
        "checkpoint",
        "engine",
        "rewriting",
        "runtime",
        "kernels",
        "network",
        "errors",
        "env",
    },
    "cli": {"llm", "analysis", "runtime", "engine", "kernels", "checkpoint", "network", "rewriting", "errors", "env"},
    "__init__": {"llm", "network", "engine", "runtime", "rewriting", "graph_rewriting", "ops"},
    "__main__": {"cli"},
}
COMPOSITION_POINTS = ("__init__.py", "llm.py", "__main__.py", "kernels/table.py", "cli/")
TORCH_FREE = ("runtime/scheduler.py", "runtime/block_manager.py", "runtime/prefix_cache.py", "runtime/request.py")
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = node.module != "enginery"
            found += (
                [(node, node.module or "")] if whole else [(node, f"enginery.{alias.name}") for alias in node.names]
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_obeys_the_import_law(path: Path) -> None:
    tree = ast.parse(path.read_text())
    allowed = MAY_IMPORT[part_of(path)] | {part_of(path)}
    name = str(path.relative_to(SOURCE))
    for node, module in imports(tree):
        if module.startswith("enginery."):
            target = module.removeprefix("enginery.")
            known = any(f"{target}.".startswith(f"{part}.") for part in allowed)
            assert known, f"{name}:{node.lineno} imports {target}"
        assert module.split(".")[0] not in ("pickle", "dill", "marshal", "shelve"), f"{name}:{node.lineno}"
        assert not (name in TORCH_FREE and module.split(".")[0] == "torch"), f"{name}:{node.lineno} imports torch"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_has_no_late_imports_and_no_mutable_state(path: Path) -> None:
    tree = ast.parse(path.read_text())
    name = str(path.relative_to(SOURCE))
    if not name.startswith(COMPOSITION_POINTS) and path.name != "__init__.py":
        inside = {inner for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for inner in ast.walk(f)}
        late = [node.lineno for node, module in imports(tree) if node in inside and module.startswith("enginery")]
        assert not late, f"{name}: imports inside functions, lines {late}"
    for node in tree.body:
        for target in assigned(node):
            if isinstance(node.value, MUTABLE) and not is_constant(target):  # type: ignore[attr-defined]
                pytest.fail(f"{name}:{node.lineno} module-level mutable state")


def assigned(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def is_constant(target: ast.expr) -> bool:
    """Written in capitals (a table that nobody changes) or a dunder such as `__all__`."""
    return isinstance(target, ast.Name) and (target.id.isupper() or target.id.startswith("__"))


def test_public_face() -> None:
    import enginery

    assert enginery.__all__ == ["LLM", "BuildConfig", "Engine", "Network", "SamplingParams", "build", "optimize"]
