"""gpt_attention(qkv + b) = gpt_attention(qkv, qkv_bias=b)

For networks that are written with TensorRT-LLM's operator. In imported decoders the bias joins its linear
(`linear_from_matmul.py`), and the linears of query, key and value are merged with their biases.
"""

from __future__ import annotations

from typing import Any

from enginery import ops
from enginery.network import Layer, Tensor
from enginery.rewriting.pattern import Const, Var
from enginery.rewriting.rule import PatternRewriter


class FuseAttentionWithBias(PatternRewriter):
    pattern = ops.gpt_attention(Var("qkv") + Const("bias", rank=1), ..., qkv_bias=None)

    def rewrite(self, root: Layer, qkv: Tensor, bias: Tensor) -> Any:
        return root.replace(qkv=qkv, qkv_bias=bias)
