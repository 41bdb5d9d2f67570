"""Moving layers so that every value is computed before it is used, as few layers as possible."""

from __future__ import annotations

from collections.abc import Sequence

from enginery.network.layer import Layer
from enginery.rewriting.edit import Edit, Pair
from enginery.rewriting.effects import Effects
from enginery.rewriting.rule import MatchFailure


def put_in_order(edit: Edit, pairs: Sequence[Pair], effects: Effects) -> None:
    """Raises MatchFailure where no order does it.

    New layers stand at the root, where a replacement of a single root is in order already. Two things can be
    amiss: a new layer reads a value that is computed later, or somebody reads a replaced value earlier.
    """
    latest = _latest_source(edit.added)
    if latest is not None:
        _sink(edit, latest)
    reader = _first_early_reader(edit.added, pairs)
    if reader is not None:
        _hoist(edit, pairs, reader, effects)


def _latest_source(added: Sequence[Layer]) -> Layer | None:
    """The last layer behind the new ones from which they read."""
    if not added:
        return None
    place, found = added[0].order, None
    for layer in added:
        for tensor in layer._inputs:
            parent = tensor.parent
            if parent is not None and parent.order > place and parent not in added:
                found, place = parent, parent.order
    return found


def _first_early_reader(added: Sequence[Layer], pairs: Sequence[Pair]) -> Layer | None:
    """The first layer that would read a replacement before it is computed."""
    found: Layer | None = None
    for old, new in pairs:
        producer = new.parent
        if producer is None or (old.parent is not None and producer.order < old.parent.order):
            continue
        for user in old._uses:
            if user.order < producer.order and user not in added and (found is None or user.order < found.order):
                found = user
    return found


def _sink(edit: Edit, after: Layer) -> None:
    if any(layer.has_effects for layer in edit.added):
        raise MatchFailure(f"a call with effects would move behind {after.name}")
    place = after._next
    for layer in edit.added:
        edit.move(layer, place)


def _hoist(edit: Edit, pairs: Sequence[Pair], reader: Layer, effects: Effects) -> None:
    """Moves what computes the replacements, as far as it stands behind `reader`, right before it."""
    replaced = {old for old, _ in pairs}
    cone: dict[Layer, None] = {}
    pending: list[Layer] = [new.parent for _, new in pairs if new.parent is not None]
    while pending:
        layer = pending.pop()
        if layer in cone or layer.order < reader.order:
            continue
        if layer not in edit.added and (layer is reader or any(tensor in replaced for tensor in layer.inputs)):
            raise MatchFailure(f"the replacement needs {layer.name}, which is computed from what it replaces")
        if layer.has_effects or any(effects.writers_of(tensor) for tensor in layer.inputs):
            raise MatchFailure(f"{layer.name} would move over calls with effects")
        cone[layer] = None
        pending.extend(tensor.parent for tensor in layer.inputs if tensor.parent is not None)
    for layer in sorted(cone, key=lambda layer: layer.order):
        edit.move(layer, reader)
