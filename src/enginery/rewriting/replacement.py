"""What a rule returned, as pairs of a value and its replacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from enginery.network.layer import Layer
from enginery.network.tensor import Tensor
from enginery.rewriting.edit import Pair


def pairs_of(result: Any, roots: Sequence[Layer], output: int) -> list[Pair]:
    """Raises TypeError with the reason if the result has none of the accepted forms.

    `output`: which output of the first root a single Tensor replaces.
    """
    root = roots[0]
    if result.__class__ is Tensor and len(roots) == 1:
        return [(root.outputs[output], result)]
    if isinstance(result, dict):
        return [pair for key, value in result.items() for pair in _pairs(_values(key), value)]
    if len(roots) > 1:
        if not isinstance(result, (tuple, list)) or len(result) != len(roots):
            raise TypeError(f"it must return one replacement for each of {len(roots)} roots, or a dictionary")
        return [pair for root, value in zip(roots, result, strict=True) for pair in _pairs(root.outputs, value)]
    return _pairs(root.outputs, result)


def _values(key: Any) -> tuple[Tensor, ...]:
    if isinstance(key, Layer):
        return key.outputs
    if isinstance(key, Tensor):
        return (key,)
    raise TypeError(f"it returned a replacement for {key!r}, which is neither a layer nor a tensor")


def _pairs(old: tuple[Tensor, ...], new: Any) -> list[Pair]:
    values = tuple(new) if isinstance(new, (tuple, list)) else (new,)
    if len(values) != len(old):
        raise TypeError(
            f"it returned {len(values)} values for {len(old)} outputs of {old[0].name if old else 'a layer'}"
        )
    pairs = []
    for before, after in zip(old, values, strict=True):
        if after is None and not before._uses and not before.output_names:
            continue
        if not isinstance(after, Tensor):
            raise TypeError(f"it returned {type(after).__name__} for {before.name}, not a Tensor of the network")
        pairs.append((before, after))
    return pairs
