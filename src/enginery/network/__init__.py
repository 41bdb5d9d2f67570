"""The IR: a network of operator calls over values with shapes and dtypes. Knows no rule, no model, no device."""

from __future__ import annotations

from enginery.network.dim import Dim, Size
from enginery.network.functions import is_value, resolve
from enginery.network.interpreter import Program
from enginery.network.kind import LayerKind
from enginery.network.layer import Layer, Provenance
from enginery.network.network import Network
from enginery.network.operator import Operator, find_operator, operator_name, signature
from enginery.network.tensor import Tensor
from enginery.network.types import infer_types

__all__ = [
    "Dim", "Layer", "LayerKind", "Network", "Operator", "Program", "Provenance", "Size", "Tensor", "find_operator",
    "infer_types", "is_value", "operator_name", "resolve", "signature",
]  # fmt: skip
