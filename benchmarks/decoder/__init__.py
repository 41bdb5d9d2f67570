"""How fast a decoder of Llama-3.1-8B's shape runs on one GPU: the parts of `benchmarks/gpu.py`."""
