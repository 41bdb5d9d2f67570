"""How numbers are quantised: values that configurations name. Reading them loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn for weights and activations: 3 bits of mantissa, the largest number is 448.

    Activations are scaled per token, in each step; weights per output channel, or per tensor, when they are bound.
    """

    per_channel: bool = True
    """a weight scale for each output; else one for the whole weight"""


SCHEMES: Mapping[str, Float8] = MappingProxyType({"fp8": Float8()})
"""By the name that `--quantization` takes."""

__all__ = ["SCHEMES", "Float8"]
