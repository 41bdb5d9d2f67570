"""The network as a Graphviz drawing: a box per layer, grouped by module, a type on every edge."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from enginery.network.layer import tensors_in
from enginery.network.operator import operator_name
from enginery.network.tensor import Tensor
from enginery.network.text import type_text

if TYPE_CHECKING:
    from enginery.network.network import Network


def to_dot(network: Network) -> str:
    """The drawing in Graphviz' language. Layers that a rule made are filled and name the rule."""
    lines = [
        "digraph network {",
        "  node [shape=box fontname=Helvetica fontsize=10]",
        "  edge [fontname=Helvetica fontsize=8]",
    ]
    for tensor in (*network.inputs, *network.constants):
        if tensor._uses or tensor.is_output or tensor.is_input:
            shape = "ellipse" if tensor.is_input else "note"
            text = f"{tensor.name}\n{type_text(tensor)}"
            lines.append(f"  {_node(tensor)} [shape={shape} label={json.dumps(text)}]")
    by_module: dict[str, list[str]] = {}
    for layer in network:
        text = f"{layer.name.rpartition('.')[2]}\n{operator_name(layer.op)}"
        style = ""
        if layer.provenance is not None:
            text += f"\n{layer.provenance.rule}"
            style = " style=filled fillcolor=lightyellow"
        by_module.setdefault(layer.module_path, []).append(
            f"{json.dumps(f'layer {layer.name}')} [label={json.dumps(text)}{style}]"
        )
    for number, (path, nodes) in enumerate(by_module.items()):
        if path:
            lines.append(f"  subgraph cluster_{number} {{ label={json.dumps(path)} color=gray")
        lines += [f"  {node}" for node in nodes]
        if path:
            lines.append("  }")
    for layer in network:
        target = json.dumps(f"layer {layer.name}")
        lines += [
            f"  {_node(tensor)} -> {target} [label={json.dumps(type_text(tensor))}]"
            for tensor in tensors_in(layer.args)
        ]
    for name, tensor in zip(network.output_names, network.outputs, strict=True):
        node = json.dumps(f"output {name}")
        lines += [f"  {node} [shape=ellipse label={json.dumps(name)}]", f"  {_node(tensor)} -> {node}"]
    return "\n".join([*lines, "}"]) + "\n"


def _node(tensor: Tensor) -> str:
    return json.dumps(f"layer {tensor.parent.name}" if tensor.parent is not None else f"value {tensor.name}")
