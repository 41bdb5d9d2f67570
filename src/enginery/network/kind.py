"""The coarse class of a layer: the 47 kinds of TensorRT 9's `LayerType`, by which rules may filter their roots."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import MappingProxyType

from enginery import ops
from enginery.network.operator import Operator, signature


class LayerKind(Enum):
    CONVOLUTION = "convolution"
    FULLY_CONNECTED = "fully connected"
    ACTIVATION = "activation"
    POOLING = "pooling"
    LRN = "local response normalisation"
    SCALE = "scale"
    SOFTMAX = "softmax"
    DECONVOLUTION = "deconvolution"
    CONCATENATION = "concatenation"
    ELEMENTWISE = "elementwise"
    PLUGIN = "plugin"
    UNARY = "unary"
    PADDING = "padding"
    SHUFFLE = "shuffle"
    REDUCE = "reduce"
    TOPK = "top-k"
    GATHER = "gather"
    MATRIX_MULTIPLY = "matrix multiply"
    RAGGED_SOFTMAX = "ragged softmax"
    CONSTANT = "constant"
    IDENTITY = "identity"
    PLUGIN_V2 = "plugin v2"
    SLICE = "slice"
    SHAPE = "shape"
    PARAMETRIC_RELU = "parametric relu"
    RESIZE = "resize"
    TRIP_LIMIT = "trip limit"
    RECURRENCE = "recurrence"
    ITERATOR = "iterator"
    LOOP_OUTPUT = "loop output"
    SELECT = "select"
    FILL = "fill"
    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    CONDITION = "condition"
    CONDITIONAL_INPUT = "conditional input"
    CONDITIONAL_OUTPUT = "conditional output"
    ASSERTION = "assertion"
    SCATTER = "scatter"
    EINSUM = "einsum"
    GRID_SAMPLE = "grid sample"
    ONE_HOT = "one-hot"
    NON_ZERO = "non-zero"
    NMS = "non-maximum suppression"
    REVERSE_SEQUENCE = "reverse sequence"
    NORMALIZATION = "normalization"
    CAST = "cast"


_ATEN = {
    LayerKind.CONVOLUTION: "conv1d conv2d conv3d convolution",
    LayerKind.FULLY_CONNECTED: "linear addmm",
    LayerKind.ACTIVATION: "relu relu6 sigmoid tanh silu gelu leaky_relu elu selu celu mish softplus hardsigmoid "
    "hardswish hardtanh "
    "clamp clamp_min clamp_max log_sigmoid glu threshold",
    LayerKind.POOLING: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d "
    "adaptive_max_pool2d",
    LayerKind.SOFTMAX: "softmax _softmax log_softmax _log_softmax special_softmax",
    LayerKind.DECONVOLUTION: "conv_transpose1d conv_transpose2d conv_transpose3d",
    LayerKind.CONCATENATION: "cat concat concatenate stack hstack vstack",
    LayerKind.ELEMENTWISE: "add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum eq ne "
    "lt le gt ge "
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift "
    "atan2 addcmul "
    "addcdiv lerp fmax fmin",
    LayerKind.UNARY: "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal abs neg sin cos tan sinh cosh asin "
    "acos atan asinh "
    "acosh atanh erf erfc erfinv floor ceil round trunc sign square logical_not bitwise_not isnan isinf isfinite logit",
    LayerKind.PADDING: "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    LayerKind.SHUFFLE: "view reshape _unsafe_view view_as reshape_as transpose permute t numpy_T mT unsqueeze "
    "squeeze flatten "
    "unflatten movedim pixel_shuffle pixel_unshuffle",
    LayerKind.REDUCE: "sum mean prod amax amin any all var std max min logsumexp linalg_vector_norm norm argmax argmin",
    LayerKind.TOPK: "topk sort argsort kthvalue",
    LayerKind.GATHER: "embedding index_select gather index take take_along_dim repeat_interleave",
    LayerKind.MATRIX_MULTIPLY: "mm bmm matmul dot mv baddbmm addmv outer",
    LayerKind.IDENTITY: "alias clone contiguous detach dropout",
    LayerKind.SLICE: "slice select narrow split split_with_sizes chunk unbind expand expand_as broadcast_to repeat "
    "flip roll",
    LayerKind.PARAMETRIC_RELU: "prelu",
    LayerKind.RESIZE: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d",
    LayerKind.RECURRENCE: "cumsum cumprod lstm gru rnn_tanh rnn_relu",
    LayerKind.SELECT: "where masked_fill tril triu",
    LayerKind.FILL: "full zeros ones arange linspace full_like zeros_like ones_like empty_like empty new_full "
    "new_zeros new_ones "
    "new_empty rand randn rand_like randn_like eye fill zero scalar_tensor",
    LayerKind.QUANTIZE: "quantize_per_tensor quantize_per_channel",
    LayerKind.DEQUANTIZE: "dequantize",
    LayerKind.SCATTER: "scatter scatter_add scatter_reduce index_put index_add index_copy index_fill slice_scatter "
    "select_scatter "
    "masked_scatter copy",
    LayerKind.EINSUM: "einsum",
    LayerKind.GRID_SAMPLE: "grid_sampler grid_sampler_2d grid_sampler_3d",
    LayerKind.ONE_HOT: "one_hot",
    LayerKind.NON_ZERO: "nonzero",
    LayerKind.NORMALIZATION: "layer_norm native_layer_norm rms_norm group_norm native_group_norm instance_norm "
    "batch_norm",
    LayerKind.CAST: "to _to_copy type_as",
}

_OWN = {
    ops.packed_embedding: LayerKind.GATHER,
    ops.pack_linear: LayerKind.SHUFFLE,
    ops.packed_linear: LayerKind.FULLY_CONNECTED,
}

WITHOUT_EQUIVALENT: Mapping[LayerKind, str] = MappingProxyType(
    {
        LayerKind.LRN: "ATen composes local response normalisation of a pooling and elementwise calls",
        LayerKind.SCALE: "a scale per tensor or channel is a multiplication and an addition, both ELEMENTWISE",
        LayerKind.PLUGIN: "TensorRT's first plugin interface, replaced by PLUGIN_V2 there",
        LayerKind.RAGGED_SOFTMAX: "PyTorch has no softmax over rows of unequal length; attention masks them",
        LayerKind.CONSTANT: "a constant is a value of the network, not a layer: `tensor.is_constant`",
        LayerKind.SHAPE: "sizes are literals of the arguments (`Dim`), not tensors",
        LayerKind.TRIP_LIMIT: "a network has no loops",
        LayerKind.ITERATOR: "a network has no loops",
        LayerKind.LOOP_OUTPUT: "a network has no loops",
        LayerKind.CONDITION: "a network has no branches",
        LayerKind.CONDITIONAL_INPUT: "a network has no branches",
        LayerKind.CONDITIONAL_OUTPUT: "a network has no branches",
        LayerKind.ASSERTION: "assertions are dropped at import; shapes are checked when inputs are bound",
        LayerKind.NMS: "ATen has none; torchvision's is outside the closed set of operators",
        LayerKind.REVERSE_SEQUENCE: "ATen reverses whole dimensions only (flip)",
    }
)
"""The kinds that no layer has, with the reason."""

_BY_NAME: Mapping[str, LayerKind] = MappingProxyType(
    {name: kind for kind, names in _ATEN.items() for name in names.split()}
)


@cache
def kind_of(op: Operator) -> LayerKind:
    """The kind of an operator's layers. What fits no other kind, our own operators foremost, is a PLUGIN_V2."""
    if op in _OWN:
        return _OWN[op]
    if op.namespace == "aten":
        return _BY_NAME.get(signature(op).short_name, LayerKind.PLUGIN_V2)
    return LayerKind.PLUGIN_V2
