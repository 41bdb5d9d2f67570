"""Effects are barriers: no rule removes one unless it says so, and no read of a value moves over a write to it.

A write reaches every value that shares its memory, so reads and writes are compared by the value that they view.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from enginery.network.layer import Layer, base_of, tensors_in
from enginery.network.operator import signature
from enginery.network.tensor import Tensor
from enginery.rewriting.edit import Pair
from enginery.rewriting.rule import MatchFailure


class Effects:
    """The calls that write, by what they write to."""

    def __init__(self) -> None:
        self._writers: dict[Tensor, list[Layer]] = {}

    def note(self, layer: Layer) -> None:
        for tensor in _written(layer):
            self._writers.setdefault(base_of(tensor), []).append(layer)

    def writers_of(self, tensor: Tensor) -> list[Layer]:
        """The layers that write to the memory of a value."""
        if not self._writers:
            return []
        return [writer for writer in self._writers.get(base_of(tensor), ()) if not writer.is_removed]

    def check(
        self, pairs: Sequence[Pair], replaced: Iterable[Layer], matched: Collection[Layer], added: Sequence[Layer],
        *, removes: bool, whole: bool,
    ) -> None:  # fmt: skip
        """Raises MatchFailure naming the effect that an edit would remove, or the write that a read would pass.

        `removes`: the rule may remove effects. `whole`: `matched` are all the layers that the replacement stands for;
        without it they may be any that those are computed from.
        """
        if not removes:
            for layer in replaced:
                if layer.has_effects and not _covers(added, layer):
                    raise MatchFailure(f"it would remove the effect of {layer.name}")
        if self._writers:
            self._check_new_reads(matched, added, whole)
            for old, new in pairs:
                self._check_readers(old, new)
                if new.parent not in added:
                    self._check_existing(new, matched, whole)

    def _check_new_reads(self, matched: Collection[Layer], added: Sequence[Layer], whole: bool) -> None:
        """A new layer does not read after a write what the match read before it."""
        earliest = min(layer.order for layer in matched)
        for layer in added:
            for tensor in layer._inputs:
                for writer in self.writers_of(tensor):
                    passed = writer not in matched and writer.order < layer.order
                    if passed and (
                        earliest < writer.order
                        or (not whole and any(r.order < writer.order for r in _readers(tensor, matched)))
                    ):
                        raise MatchFailure(f"it would read {base_of(tensor).name} after {writer.name} wrote to it")

    def _check_readers(self, old: Tensor, new: Tensor) -> None:
        """Where the replacement can be written to, unlike what it replaces, nobody reads it after a write."""
        if base_of(old) is base_of(new):
            return
        for writer in self.writers_of(new):
            if (old.parent is None or old.parent.order < writer.order) and writer is not old.parent:
                late = any(user.order > writer.order for user in old._uses) or old.output_names
                if late:
                    raise MatchFailure(f"it would read {base_of(new).name} after {writer.name} wrote to it")

    def _check_existing(self, new: Tensor, matched: Collection[Layer], whole: bool) -> None:
        """A value that there is already was not computed before a write that the match saw."""
        place = new.parent.order if new.parent is not None else 0
        layers = matched if whole else _ancestors(matched, place)
        for layer in layers:
            for tensor in layer._inputs:
                if base_of(tensor) is base_of(new):
                    continue
                for writer in self.writers_of(tensor):
                    if writer not in matched and place < writer.order < layer.order:
                        raise MatchFailure(f"it would read {base_of(tensor).name} before {writer.name} wrote to it")


def _ancestors(layers: Iterable[Layer], after: int) -> list[Layer]:
    """The layers and those that they are computed from, as far back as that place in the execution order."""
    found: dict[Layer, None] = {}
    pending = list(layers)
    while pending:
        layer = pending.pop()
        if layer not in found and layer.order > after:
            found[layer] = None
            pending.extend(tensor.parent for tensor in layer._inputs if tensor.parent is not None)
    return list(found)


def _readers(tensor: Tensor, layers: Iterable[Layer]) -> list[Layer]:
    """Those of the layers and their ancestors that read the memory of a value."""
    base = base_of(tensor)
    return [layer for layer in _ancestors(layers, 0) if any(base_of(read) is base for read in layer._inputs)]


def _written(layer: Layer) -> list[Tensor]:
    return [tensor for place in signature(layer.op).written for tensor in tensors_in(layer.args[place])]


def _covers(added: Sequence[Layer], old: Layer) -> bool:
    """The new layers have the effects of the old one: they write what it wrote, and one draws if it drew."""
    written = set(_written(old))
    draws = signature(old.op).random
    for layer in added:
        written -= set(_written(layer))
        draws = draws and not signature(layer.op).random
    return not written and not draws
