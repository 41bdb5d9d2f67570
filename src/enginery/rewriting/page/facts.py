"""What the page shows, as plain JSON: phases, rules, and the layers of each part before and after them.

A part is one repeated block of the network (a decoder layer); blocks that look alike are shown once. What belongs to no
block is a part of its own. Values that a part reads from elsewhere are listed beside its layers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from enginery.network import Layer, Network, Tensor, operator_name
from enginery.network.layer import tensors_in
from enginery.network.operator import signature
from enginery.network.text import same_value, type_text, value_text
from enginery.rewriting.expectations import block_of, repeated_blocks
from enginery.rewriting.lineage import Lineage
from enginery.rewriting.report import Report

Phases = Sequence[tuple[str, Report]]
Json = dict[str, Any]

OUTSIDE = "outside the repeated layers"
WHOLE = "the whole network"
_SOURCES = Path(__file__).parents[3]


def page_facts(before: Network, after: Network, phases: Phases, *, title: str) -> Json:
    """Of a network as it was and as it is behind `phases`, whose reports must be of these two networks."""
    lineage = Lineage(phases)
    heirs: dict[str, list[str]] = {}
    for layer in after:
        for origin in lineage.origins(layer.name) if lineage.made(layer.name) else ():
            heirs.setdefault(origin, []).append(layer.name)
    parts = [
        {
            "name": name,
            "blocks": list(blocks),
            "before": _side(olds, before, lineage, heirs),
            "after": _side(news, after, lineage, heirs),
        }
        for name, blocks, olds, news in _parts(before, after)
    ]
    return {"title": title, "phases": list(_phases(phases)), "rules": list(_rules(phases)), "parts": parts}


def _phases(phases: Phases) -> Iterator[Json]:
    for name, report in phases:
        yield {
            "name": name,
            "milliseconds": round(report.milliseconds, 2),
            "before": report.layers_before,
            "after": report.layers_after,
            "rules": [
                {
                    "label": rule.label,
                    "tried": rule.tried,
                    "matched": rule.matched,
                    "applied": rule.rewritten,
                    "milliseconds": round(rule.milliseconds, 2),
                }
                for rule in report.rules.values()
                if rule.rewritten or rule.matched
            ],
        }


def _rules(phases: Phases) -> Iterator[Json]:
    """Those that applied, in the order of their first phase."""
    applied: dict[str, str] = {}
    for _, report in phases:
        for rule in report.rules.values():
            if rule.rewritten:
                applied.setdefault(rule.label, rule.location)
    for label, location in applied.items():
        yield {"label": label, "location": _short(location), "equation": equation(location)}


def _short(location: str) -> str:
    """Without the directory in which this package is installed."""
    return location.removeprefix(f"{_SOURCES}/")


def equation(location: str) -> str:
    """The first paragraph that says what the rule at file:line does: of its class, or of its file."""
    file, _, line = location.rpartition(":")
    try:
        tree = ast.parse(Path(file).read_text())
    except (OSError, ValueError, SyntaxError):
        return ""
    number = int(line)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    around = [node for node in classes if node.lineno <= number <= (node.end_lineno or 0)]
    own = ast.get_docstring(around[-1]) if around else None
    return " ".join((own or ast.get_docstring(tree) or "").partition("\n\n")[0].split())


# Parts

Part = tuple[str, Sequence[str], list[Layer], list[Layer]]


def _parts(before: Network, after: Network) -> Iterator[Part]:
    """Name, the blocks that look like it, the layers before and after: each kind of block, the most frequent first."""
    blocks = repeated_blocks(layer.module_path for layer in (*before, *after))
    olds, news = _by_block(before, blocks), _by_block(after, blocks)
    kinds: dict[tuple, list[str]] = {}
    for block in sorted(blocks, key=_number):
        key = (_look(olds.get(block, []), block), _look(news.get(block, []), block))
        kinds.setdefault(key, []).append(block)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        yield alike[0], alike, olds.get(alike[0], []), news.get(alike[0], [])
    if "" in olds or "" in news:
        yield OUTSIDE if blocks else WHOLE, (), olds.get("", []), news.get("", [])


def _by_block(network: Network, blocks: frozenset[str]) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layer in network:
        block = block_of(layer.module_path)
        found.setdefault(block if block in blocks else "", []).append(layer)
    return found


def _number(block: str) -> int:
    return int(block.rpartition(".")[2])


def _look(layers: Iterable[Layer], block: str) -> tuple:
    """Equal for blocks that differ in their number only."""
    prefix = f"{block}."

    def value(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.name.removeprefix(prefix) if item.name.startswith(prefix) else type_text(item)
        return tuple(map(value, item)) if isinstance(item, tuple) else value_text(item)

    return tuple(
        (layer.name.removeprefix(prefix), layer.op, value(layer.args), *map(type_text, layer.outputs))
        for layer in layers
    )


# Layers


def _side(layers: Sequence[Layer], network: Network, lineage: Lineage, heirs: dict[str, list[str]]) -> Json:
    own = {output for layer in layers for output in layer.outputs}
    read = dict.fromkeys(tensor for layer in layers for tensor in layer.inputs)
    return {
        "total": len(network),
        "layers": [_layer(layer, lineage, heirs) for layer in layers],
        "outside": {tensor.name: _value(tensor) for tensor in read if tensor not in own},
    }


def _value(tensor: Tensor) -> Json:
    kind = "input" if tensor.is_input else "constant" if tensor.is_constant else "value"
    return {"type": type_text(tensor), "kind": kind}


def _layer(layer: Layer, lineage: Lineage, heirs: dict[str, list[str]]) -> Json:
    known = signature(layer.op)
    gone = lineage.gone(layer.name)
    history = [
        {"phase": phase, "rule": application.rule, "replaced": application.replaced}
        for phase, application in lineage.history(layer.name)
    ]
    return {
        "name": layer.name,
        "op": operator_name(layer.op),
        "short": known.short_name,
        "path": layer.module_path,
        "args": [
            {"name": name, "value": list(_pieces(value)), "omitted": same_value(value, default)}
            for name, default, value in zip(known.names, known.defaults, layer.args, strict=True)
        ],
        "outputs": [
            {
                "name": output.name,
                "type": type_text(output),
                "readers": [user.name for user in output.users],
                "returned": list(output.output_names),
            }
            for output in layer.outputs
        ],
        "constant": layer.is_constant,
        "effects": layer.has_effects,
        "history": history,
        "origins": lineage.origins(layer.name) if history else [],
        "gone": {"phase": gone.phase, "rule": gone.application.rule} if gone is not None else None,
        "heirs": heirs.get(layer.name, []),
    }


def _pieces(value: Any) -> Iterator[str | Json]:
    """The text of an argument in which tensors stand as links: `["[", {"tensor": "x"}, "]"]`."""
    if isinstance(value, Tensor):
        yield {"tensor": value.name}
    elif isinstance(value, tuple) and next(tensors_in(value), None) is not None:
        yield "["
        for i, item in enumerate(value):
            if i:
                yield ", "
            yield from _pieces(item)
        yield "]"
    else:
        yield value_text(value)


__all__ = ["equation", "page_facts"]
