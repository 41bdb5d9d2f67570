"""Kernels for NVIDIA GPUs, written in Triton. Their grids follow from shapes alone, so CUDA graphs can capture them."""
