"""Tiles of cuBLAS that fill the GPU, where what it proposes does not.

A product is cut into tiles, and the multiprocessors take one each, wave after wave. Decoding has few waves: gate and up
of 256 rows are 224 tiles of 256 × 128 features and rows, 1.7 waves of the 132 multiprocessors of an H200, and cost as
much as 264. Tiles of 224 × 128 are 256. cuBLAS has kernels for these, but proposes none of them: of the thirteen that
it proposes for this product, the largest that fill their waves are 112 × 128.
"""

from __future__ import annotations

import math

TILES = {
    64: (15, 17), 72: (124, 125), 80: (134, 135), 88: (143, 144), 96: (27, 28), 104: (157, 158), 112: (164, 165),
    120: (170, 171), 128: (18, 20), 136: (178, 179), 144: (183, 184), 152: (188, 189), 160: (193, 30), 168: (196, 197),
    176: (200, 201), 184: (204, 205), 192: (208, 31), 200: (211, 212), 208: (214, 215), 216: (217, 218),
    224: (220, 221), 232: (223, 224), 240: (226, 227), 248: (229, 230), 256: (21, 24),
}  # fmt: skip
"""Numbers in cublasLt.h of the tiles of so many features and of 64 and 128 rows."""
WIDTHS = (64, 128)
FILLED = 0.9
"""of the multiprocessors' turns must have a tile"""
MOST_WAVES = 4
"""Of more, the last one counts little."""
TRIED = 2
"""tiles"""
OPTIONS = (0, 1, 2, 3, 6, 7)
"""Which operand is turned, the order of the tiles, one or two groups of warps on a tile: not documented."""
CLUSTERS = (2, 3, 5)
"""One program, or two that share what they read of the rows or of the weight."""


def filling(rows: int, features: int, processors: int) -> list[int]:
    """Numbers of the tiles by which a product `[rows, depth]` · `[features, depth]`ᵀ takes the shortest waves, if they
    are full; of equal ones the largest, which reads the least."""
    found = []
    for height, numbers in TILES.items():
        for width, number in zip(WIDTHS, numbers, strict=True):
            tiles = math.ceil(features / height) * math.ceil(rows / width)
            waves = math.ceil(tiles / processors)
            if waves <= MOST_WAVES and tiles >= FILLED * waves * processors:
                found.append((waves * height * width, -height * width, number))
    return [number for *_, number in sorted(found)[:TRIED]]
