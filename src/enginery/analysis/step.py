"""The shape of one step, in numbers: what stands for the symbolic sizes of a rewritten network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from enginery.errors import UsageError


@dataclass(frozen=True)
class Step:
    """`tokens` new tokens, divided evenly over `sequences`, each behind `context` tokens that are in the KV cache.

    Decoding is one token a sequence, prefill has no context: `Step(8, 8, 1024)`, `Step(512)`. Logits are
    computed for the last token of each sequence. `sizes` gives values to the symbols of networks that name others.
    """

    tokens: int = 1
    sequences: int = 1
    context: int = 0
    block_size: int = 16
    """tokens of one KV block"""
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, least in (("sequences", self.sequences, 1), ("context", self.context, 0)):
            if value < least:
                raise UsageError(f"--{name} {value} is no step", f"Give a number of at least {least}")
        if self.tokens < self.sequences:
            raise UsageError(
                f"{self.tokens} new tokens cannot be divided over {self.sequences} sequences",
                "Raise --tokens or lower --sequences",
            )

    @property
    def symbols(self) -> dict[str, int]:
        """Values of the symbolic sizes, by name."""
        blocks = -(-self.longest // self.block_size)
        return {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "sequences_plus_1": self.sequences + 1,
            "logits": self.sequences,
            "blocks": blocks,
            "num_blocks": blocks * self.sequences,
            **self.sizes,
        }

    @property
    def longest(self) -> int:
        """Length of the longest sequence after the step."""
        return self.context + max(count for _, count in self.queries())

    def queries(self) -> Iterator[tuple[int, int]]:
        """(number of sequences, new tokens of each): one pair, or two where the tokens do not divide evenly."""
        each, more = divmod(self.tokens, self.sequences)
        if more:
            yield more, each + 1
        yield self.sequences - more, each

    def __str__(self) -> str:
        return f"step of tokens {self.tokens:,}, sequences {self.sequences:,}, context {self.context:,}"


def visible_pairs(queries: int, context: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: Σ min(i, window) for i = context + 1 … context + queries."""
    whole = queries if window is None else min(max(window - context, 0), queries)
    pairs = whole * context + whole * (whole + 1) // 2
    return pairs if window is None else pairs + (queries - whole) * window


def visible_keys(queries: int, context: int, window: int | None) -> int:
    """Keys that at least one of the queries sees."""
    length = context + queries
    return length if window is None else min(length, window + queries - 1)
