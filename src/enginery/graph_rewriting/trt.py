"""What rules of that time use of `import tensorrt as trt`."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import torch

from enginery.network.kind import LayerKind


class ElementWiseOperation(Enum):
    SUM, PROD, MAX, MIN, SUB, DIV, POW = "add", "mul", "maximum", "minimum", "sub", "div", "pow"
    FLOOR_DIV, AND, OR, XOR = "floor_divide", "logical_and", "logical_or", "logical_xor"
    EQUAL, GREATER, LESS = "eq", "gt", "lt"


trt = SimpleNamespace(
    LayerType=LayerKind, ElementWiseOperation=ElementWiseOperation, float32=torch.float32, float16=torch.float16,
    bfloat16=torch.bfloat16, int32=torch.int32, int8=torch.int8, bool=torch.bool,
)  # fmt: skip
