"""cuBLASLt, the matrix products of cuBLAS, by ctypes. torch calls it too, but lets nobody choose the algorithm.

Only what a linear layer needs: input `[M, K]` · weight `[N, K]`ᵀ. cuBLAS counts by columns: to it both are transposed,
and the result is weight · inputᵀ, `[N, M]`. Numbers in capitals are those of cublasLt.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from typing import Any

import torch

from enginery.ops.precision import FLOAT8

TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.float32: 0, FLOAT8: 28}
COMPUTE_FLOAT32 = 68
TRANSPOSED = 1
TRANSPOSE_A, SCALE_A, SCALE_B, FAST_ACCUMULATION, SCALE_MODE_A, SCALE_MODE_B = 3, 17, 18, 25, 31, 32
OUTER_VECTOR = 3
"""mode of scales: one for each row of either operand"""
MOST_WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)
TILE, OPTION, CLUSTER = 1, 5, 8
IN_FLOAT32 = 2
"""Mask of reductions: the parts of a split depth are added up in the type of the sums, not in that of the result."""
ALIGNED = 16
"""bytes that addresses and rows are multiples of"""
MOST_ALGORITHMS = 32
ZERO, ONE = c_float(0), c_float(1)


class Opaque(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class Found(ctypes.Structure):
    _fields_ = [
        ("algorithm", Opaque), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


@dataclass(frozen=True)
class Algorithm:
    """A kernel with its tiles, stages, clusters and parts of the depth, as cuBLAS of one version encodes it."""

    code: bytes
    workspace: int
    """bytes that it needs"""


@dataclass(frozen=True)
class Shape:
    """A product `[rows, depth]` · `[features, depth]`ᵀ of two tensors of `dtype`."""

    rows: int
    features: int
    depth: int
    dtype: torch.dtype
    by_rows: bool = False
    """Of float8: the product is multiplied by a scale for each row of either operand."""

    @property
    def result(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == FLOAT8 else self.dtype


def takes(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """They are matrices as the algorithms take them. Of others torch says what is wrong, or multiplies them."""
    return (
        len(input) > 0
        and len(weight) > 0
        and input.dtype == weight.dtype
        and input.dtype in TYPES
        and input.shape[1] == weight.shape[1]
        and input.stride(0) >= input.shape[1]
        and weight.is_contiguous()
        and is_aligned(input)
        and is_aligned(weight)
    )


def is_aligned(tensor: torch.Tensor) -> bool:
    row = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and tensor.data_ptr() % ALIGNED == row % ALIGNED == 0


class CublasLt:
    """The library on one device."""

    def __init__(self) -> None:
        """Raises OSError if torch has brought no such library."""
        self._library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")
        self._library.cublasLtGetVersion.restype = c_size_t
        self.version = int(self._library.cublasLtGetVersion())
        self._handle = c_void_p()
        self._call("Create", byref(self._handle))

    def algorithms(self, shape: Shape, most_workspace: int) -> list[Algorithm]:
        """What cuBLAS takes to be fast, its favourite first; nothing if it has no such product."""
        try:
            return self._proposed(shape, most_workspace)
        except RuntimeError:  # an earlier version knows no scales by rows
            return []

    def _proposed(self, shape: Shape, most_workspace: int) -> list[Algorithm]:
        found, count = (Found * MOST_ALGORITHMS)(), c_int()
        with self._described(shape) as description, self._created("MatmulPreference") as preference:
            self._set("MatmulPreference", preference, MOST_WORKSPACE, c_uint64(most_workspace))
            self._set("MatmulPreference", preference, REDUCTIONS, c_uint32(IN_FLOAT32))
            for operand in ALIGNMENTS:
                self._set("MatmulPreference", preference, operand, c_uint32(ALIGNED))
            product, weight, input, output = description
            status = self._library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, product, weight, input, output, output, preference, MOST_ALGORITHMS, found, byref(count)
            )
        if status != 0:
            return []
        return [Algorithm(bytes(each.algorithm), each.workspace) for each in found[: count.value] if each.state == 0]

    def accepts(self, shape: Shape, algorithm: Algorithm) -> bool:
        """Whether the algorithm, of another number of rows, say, does this product."""
        workspace = self._workspace(shape, Opaque.from_buffer_copy(algorithm.code))
        return workspace is not None and workspace <= algorithm.workspace

    def with_tile(self, shape: Shape, algorithm: Algorithm, tile: int, option: int, cluster: int) -> Algorithm | None:
        """The algorithm with another tile, option of its kernels and cluster of programs; None if there is none."""
        code = Opaque.from_buffer_copy(algorithm.code)
        settings = ((TILE, c_uint32(tile)), (OPTION, c_uint32(option)), (CLUSTER, ctypes.c_uint16(cluster)))
        for attribute, value in settings:
            status = self._library.cublasLtMatmulAlgoConfigSetAttribute(
                byref(code), attribute, byref(value), c_size_t(sizeof(value))
            )
            if status != 0:
                return None
        workspace = self._workspace(shape, code)
        return None if workspace is None else Algorithm(bytes(code), workspace)

    def _workspace(self, shape: Shape, code: Opaque) -> int | None:
        """Bytes that it needs for the product; None if it does not do it."""
        found = Found()
        with self._described(shape) as (product, weight, input, output):
            status = self._library.cublasLtMatmulAlgoCheck(
                self._handle, product, weight, input, output, output, byref(code), byref(found)
            )
        return found.workspace if status == 0 else None

    def multiply(
        self,
        shape: Shape,
        algorithm: Algorithm,
        input: torch.Tensor,
        weight: torch.Tensor,
        scales: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """`scales` of float8, in float32: of the input and of the weight, `[1]` or by rows `[M]` and `[N]`."""
        output = input.new_empty(shape.rows, shape.features, dtype=shape.result)
        workspace = input.new_empty(algorithm.workspace, dtype=torch.uint8)
        code = Opaque.from_buffer_copy(algorithm.code)
        stream = c_void_p(torch.cuda.current_stream(input.device).cuda_stream)
        with self._described(shape, input.stride(0)) as (product, left, right, result):
            if shape.dtype == FLOAT8:
                for attribute, scale in zip((SCALE_B, SCALE_A), scales, strict=True):
                    self._set("MatmulDesc", product, attribute, c_void_p(scale.data_ptr()))
            self._call(
                "Matmul", self._handle, product, byref(ONE), address(weight), left, address(input), right, byref(ZERO),
                address(output), result, address(output), result, byref(code), address(workspace),
                c_size_t(algorithm.workspace), stream,
            )  # fmt: skip
        return output

    @contextmanager
    def _described(self, shape: Shape, input_stride: int | None = None) -> Iterator[tuple[c_void_p, ...]]:
        """(product, weight, input, output)"""
        with ExitStack() as stack:
            product = stack.enter_context(self._created("MatmulDesc", c_int(COMPUTE_FLOAT32), TYPES[torch.float32]))
            self._set("MatmulDesc", product, TRANSPOSE_A, c_int32(TRANSPOSED))
            if shape.dtype == FLOAT8:
                self._set("MatmulDesc", product, FAST_ACCUMULATION, c_int8(1))
            if shape.by_rows:
                self._set("MatmulDesc", product, SCALE_MODE_A, c_int32(OUTER_VECTOR))
                self._set("MatmulDesc", product, SCALE_MODE_B, c_int32(OUTER_VECTOR))
            matrices = (
                (shape.dtype, shape.depth, shape.features, shape.depth),
                (shape.dtype, shape.depth, shape.rows, input_stride or shape.depth),
                (shape.result, shape.features, shape.rows, shape.features),
            )
            layouts = [
                stack.enter_context(
                    self._created("MatrixLayout", TYPES[dtype], c_uint64(height), c_uint64(width), c_int64(stride))
                )
                for dtype, height, width, stride in matrices
            ]
            yield (product, *layouts)

    @contextmanager
    def _created(self, kind: str, *arguments: Any) -> Iterator[c_void_p]:
        made = c_void_p()
        self._call(f"{kind}Create", byref(made), *arguments)
        try:
            yield made
        finally:
            self._call(f"{kind}Destroy", made)

    def _set(self, kind: str, of: c_void_p, attribute: int, value: Any) -> None:
        self._call(f"{kind}SetAttribute", of, attribute, byref(value), c_size_t(sizeof(value)))

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] = getattr(self._library, f"cublasLt{name}")
        status = function(*arguments)
        if status != 0:
            raise RuntimeError(f"cublasLt{name} failed with status {status}")


def address(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
