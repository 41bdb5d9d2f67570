"""One rewrite as a transaction: what a rule appended, what it replaced, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from enginery.network.layer import Layer, Provenance
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.network.types import infer_types
from enginery.rewriting.rule import MatchFailure

Pair = tuple[Tensor, Tensor]
"""a value and what replaces it"""


class Edit:
    """Everything that one application of a rule changes, so that it can be undone.

    Only the newest edit of a network that is not yet undone may be undone.
    """

    __slots__ = (
        "_before", "_constants", "_erased", "_inputs", "_moved", "_outputs", "_rebound", "_retyped", "added",
        "network", "replaced",
    )  # fmt: skip

    def __init__(self, network: Network, root: Layer) -> None:
        self.network = network
        self._before = root._previous
        self._constants, self._inputs = len(network._constants), len(network._inputs)
        self._retyped: list[tuple[Tensor, Any, Any]] = []
        self.added: list[Layer] = []
        self.replaced: list[Layer] = []
        self._rebound: list[tuple[Layer, tuple]] = []
        self._outputs: list[tuple[str, Tensor]] = []
        self._erased: list[tuple[Layer, Layer | None]] = []
        self._moved: list[tuple[Layer, Layer | None]] = []

    def collect(self, root: Layer) -> list[Layer]:
        """The layers that were appended before `root` since the edit began."""
        layer = self.network._first if self._before is None else self._before._next
        while layer is not root and layer is not None:
            self.added.append(layer)
            layer = layer._next
        return self.added

    def sign(self, rule: str, replaced: tuple[str, ...]) -> None:
        """Writes into the new layers where they come from."""
        provenance = Provenance(rule, replaced)
        for layer in self.added:
            layer.provenance = provenance

    def replace(self, pairs: Sequence[Pair]) -> None:
        """Whoever reads the old values reads the new ones, except for the layers that this edit added."""
        added = self.added
        for old, new in pairs:
            for user in list(old._uses):
                if user not in added:
                    self._rebound.append((user, user._args))
                    user.replace_input(old, new)
            for name in tuple(old.output_names):
                self._outputs.append((name, old))
                self.network.set_output(name, new)

    def retype(self, pairs: Sequence[Pair]) -> None:
        """Infers types again behind replacements that have another one. Raises NetworkError if a call does not
        take them.
        """
        pending = {
            user: None for old, new in pairs if (old.shape, old.dtype) != (new.shape, new.dtype) for user in new._uses
        }
        while pending:
            layer = min(pending, key=lambda layer: layer.order)
            del pending[layer]
            types = infer_types(layer.op, layer.args)
            for output, (shape, dtype) in zip(layer.outputs, types, strict=True):
                if (output.shape, output.dtype) != (shape, dtype):
                    self._retyped.append((output, output.shape, output.dtype))
                    output.shape, output.dtype = shape, dtype
                    pending.update(dict.fromkeys(output._uses))

    def erase_unused(self, replaced: Collection[Layer], matched: Iterable[Layer]) -> list[Layer]:
        """Erases the matched layers that nobody reads any more, and what only they needed. Returns the erased ones.

        A call with effects goes only if it was replaced.
        """
        pending = list(matched)
        pending.reverse()
        erased = []
        while pending:
            layer = pending.pop()
            if layer.is_removed or _is_read(layer) or (layer.has_effects and layer not in replaced):
                continue
            self._erased.append((layer, layer._next))
            self.network.erase(layer)
            erased.append(layer)
            pending.extend([tensor.parent for tensor in layer._inputs if tensor.parent is not None])
        return erased

    def move(self, layer: Layer, place: Layer | None) -> None:
        self._moved.append((layer, layer._next))
        self.network._unlink(layer)
        self.network._link_before(layer, place)

    def abandon(self, root: Layer) -> None:
        """Takes back what a rule did that declined or raised before its edit was complete."""
        if not self.added:
            self.collect(root)
        self.undo()

    def undo(self) -> None:
        """Back to the network as it was before the edit."""
        network = self.network
        for layer, following in reversed(self._erased):
            layer._hold_inputs()
            network._link_before(layer, following)
            network._layers[layer.name] = layer
            layer.is_removed = False
        for tensor, shape, dtype in reversed(self._retyped):
            tensor.shape, tensor.dtype = shape, dtype
        for name, old in reversed(self._outputs):
            network.set_output(name, old)
        for user, args in reversed(self._rebound):
            user._set_args(args)
        for layer, following in reversed(self._moved):
            network._unlink(layer)
            network._link_before(layer, following)
        for layer in reversed(self.added):
            network.erase(layer)
        while len(network._inputs) > self._inputs:
            network._inputs.popitem()
        while len(network._constants) > self._constants:
            name, _ = network._constants.popitem()
            network.values.pop(name, None)


def _is_read(layer: Layer) -> bool:
    for output in layer.outputs:  # noqa: SIM110  (a hot loop)
        if output._uses or output.output_names:
            return True
    return False


def put_in_order(edit: Edit, pairs: Sequence[Pair], mutable: Collection[Tensor]) -> None:
    """Moves layers so that every value is computed before it is used. Raises MatchFailure where no order does that.

    New layers stand at the root, where a replacement of a single root is in order already. Two things can be
    amiss: a new layer reads a value that is computed later, or somebody reads a replaced value earlier.
    """
    latest = _latest_source(edit.added)
    if latest is not None:
        _sink(edit, latest)
    reader = _first_early_reader(edit.added, pairs)
    if reader is not None:
        _hoist(edit, pairs, reader, mutable)


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


def _hoist(edit: Edit, pairs: Sequence[Pair], reader: Layer, mutable: Collection[Tensor]) -> None:
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
        if layer.has_effects or any(tensor in mutable for tensor in layer.inputs):
            raise MatchFailure(f"{layer.name} would move over calls with effects")
        cone[layer] = None
        pending.extend(tensor.parent for tensor in layer.inputs if tensor.parent is not None)
    for layer in sorted(cone, key=lambda layer: layer.order):
        edit.move(layer, reader)


def pairs_of(result: Any, roots: Sequence[Layer], output: int) -> list[Pair]:
    """What a rule returned, as pairs. Raises TypeError with the reason if it is none of the accepted forms."""
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
