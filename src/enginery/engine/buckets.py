"""The few shapes that steps on a GPU are padded to, so that each can be captured once."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from enginery.engine.inputs import StepShape
from enginery.engine.protocol import EngineLimits

MAX_TOKENS = 2048
"""Of a captured step: above it, a kernel runs longer than the host needs to launch the next."""
FEW_SEQUENCES = 32
"""So few do not fill a GPU: attention cuts their contexts into parts, as many as the columns of the block tables allow.
Mixed steps of so few have shapes of their own: prompts that arrive while little else runs."""
CONTEXTS_OF_FEW = (32, 128, 512, 2048, 8192, 32768, 131072)
"""Columns of the block tables of few sequences."""
CONTEXTS = (512, 8192, 131072)
"""Of more: there they cost no more than their copy to the device."""
CONTEXTS_OF_FEW_AT_OPEN = 2
MIXED = (64, 128, 160, 192, 256, 320, *range(384, 1024, 128), *range(1024, MAX_TOKENS + 1, 256))
"""Tokens of steps that are not all decoding. Each size is a graph more to be captured when an engine opens, and sizes
between these save little or lose: products cost by tiles, of 128 rows above 256. The four of a Llama-8B layer in
bfloat16 take an H200 139 µs for 96 rows as for 128, 184 for 224 and 182 for 256, 213 for 288, 212 for 320 and 246 for
384; 448 rows take 403, by a kernel that cuBLAS chooses badly, and 512 take 297."""


def ladder(limit: int) -> list[int]:
    """Sizes up to `limit`: powers of two to 16, multiples of 8 to 32, then in quarters of an octave."""
    sizes: list[int] = []
    size = 1
    while size < limit:
        sizes.append(size)
        octave = 1 << (size.bit_length() - 1)
        size += max(octave // 4, min(8, octave))
    return [*sizes, limit]


@dataclass(frozen=True)
class Buckets:
    """The shapes that steps are padded to."""

    decode: tuple[int, ...]
    """sequences of a step with one new token each"""
    mixed: tuple[int, ...]
    """tokens of any other step"""
    sequences: tuple[int, ...]
    """of a mixed step"""
    longest: int
    """columns of a block table that holds the longest sequence"""

    @classmethod
    def of(cls, limits: EngineLimits) -> Buckets:
        most = limits.max_num_seqs
        largest = min(MAX_TOKENS, limits.max_num_tokens)
        tokens = (*(size for size in MIXED if size < largest), largest)
        return cls(
            tuple(ladder(min(most, limits.max_num_tokens))),
            tuple(size for size in tokens if size >= FEW_SEQUENCES),
            (FEW_SEQUENCES, most) if most > FEW_SEQUENCES else (most,),
            -(-limits.max_model_len // limits.block_size),
        )

    def blocks(self, sequences: int) -> tuple[int, ...]:
        """Columns of the block tables of a step of so many."""
        sizes = CONTEXTS_OF_FEW if sequences <= FEW_SEQUENCES else CONTEXTS
        return (*(size for size in sizes if size < self.longest), self.longest)

    def mixed_with(self, sequences: int) -> tuple[int, ...]:
        """Tokens of a mixed step padded to so many: more than they are, for as many would be taken for decoding."""
        return self.mixed[bisect.bisect_right(self.mixed, sequences) :]

    def fitting(self, shape: StepShape) -> StepShape | None:
        """The smallest that holds a step; None where there is none."""
        is_decode = shape.is_decode and shape.logits <= shape.sequences
        found = self._holding(shape, self.decode if is_decode else self.sequences)
        if found is None:
            return None
        sequences, blocks = found
        tokens = sequences if is_decode else _at_least(self.mixed_with(sequences), shape.tokens)
        return None if tokens is None else StepShape(tokens, sequences, blocks, sequences)

    def launched(self, shape: StepShape) -> StepShape:
        """How a step that no captured shape holds is padded: not its tokens, but sequences and columns to those of
        captured steps. For these kernels have been compiled; one that a server meets first holds it up for a second.
        """
        found = self._holding(shape, self.sequences)
        # As many sequences as tokens would be taken for decoding.
        if shape.is_decode or found is None or shape.tokens <= found[0]:
            return shape
        sequences, blocks = found
        return StepShape(shape.tokens, sequences, blocks, sequences)

    def _holding(self, shape: StepShape, sizes: Sequence[int]) -> tuple[int, int] | None:
        """(sequences of `sizes`, columns) that hold those of a step and its logits."""
        sequences = _at_least(sizes, max(shape.sequences, shape.logits))
        blocks = None if sequences is None else _at_least(self.blocks(sequences), shape.blocks)
        return None if sequences is None or blocks is None else (sequences, blocks)

    def at_open(self) -> Iterator[StepShape]:
        """The usual shapes, the largest first: what they free serves the smaller ones."""
        for sequences in reversed(self.sequences):
            for tokens in reversed(self.mixed_with(sequences)):
                yield StepShape(tokens, sequences, self._usual_blocks(sequences)[-1], sequences)
        for size in reversed(self.decode):
            for blocks in self._usual_blocks(size):
                yield StepShape(size, size, blocks, size)

    def _usual_blocks(self, sequences: int) -> tuple[int, ...]:
        return self.blocks(sequences)[: CONTEXTS_OF_FEW_AT_OPEN if sequences <= FEW_SEQUENCES else 1]


def _at_least(sizes: Sequence[int], size: int) -> int | None:
    place = bisect.bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else None


__all__ = ["Buckets", "ladder"]
