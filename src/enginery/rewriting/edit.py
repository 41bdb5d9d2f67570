"""One rewrite as a transaction: what a rule appended, what it replaced, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from enginery.network.layer import Layer, Provenance
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.network.types import infer_types

Pair = tuple[Tensor, Tensor]
"""a value and what replaces it"""


class Edit:
    """Everything that one application of a rule changes, so that it can be undone.

    Only the newest edit of a network that is not yet undone may be undone.
    """

    __slots__ = (
        "_before", "_constants", "_inputs", "_log", "added", "answer", "erased", "moved", "network", "rebound", "root",
    )  # fmt: skip

    def __init__(self, network: Network, root: Layer) -> None:
        self.network, self.root = network, root
        self._before = root._previous
        self._constants, self._inputs = len(network._constants), len(network._inputs)
        self.answer: Any = None
        """what it repeats, or what will be repeated as it"""
        self.added: list[Layer] = []
        self.rebound: list[Layer] = []
        """those that read another value now"""
        self.erased: list[Layer] = []
        self.moved: list[Layer] = []
        self._log: list[tuple[Callable[..., None], tuple]] = []
        """what to call, last entry first, to be back where the edit began"""

    def collect(self) -> list[Layer]:
        """The layers that were appended before the root since the edit began."""
        layer = self.network._first if self._before is None else self._before._next
        while layer is not self.root and layer is not None:
            self.added.append(layer)
            layer = layer._next
        return self.added

    def sign(self, rule: str, replaced: tuple[str, ...]) -> None:
        """Writes into the new layers where they come from."""
        provenance = Provenance(rule, replaced)
        for layer in self.added:
            layer.provenance = provenance

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Whoever reads the old value reads the new one, except for the layers that this edit added."""
        added, log = self.added, self._log
        for user in list(old._uses):
            if user not in added:
                log.append((user._set_args, (user._args,)))
                user.replace_input(old, new)
                self.rebound.append(user)
        for name in old.output_names:
            log.append((self.network.set_output, (name, old)))
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
                    self._log.append((_set_type, (output, output.shape, output.dtype)))
                    _set_type(output, shape, dtype)
                    pending.update(dict.fromkeys(output._uses))

    def erase_unused(self, replaced: Collection[Layer], matched: Iterable[Layer]) -> None:
        """Erases the matched layers that nobody reads any more, and what only they needed.

        A call with effects goes only if it was replaced.
        """
        pending = list(matched)
        pending.reverse()
        network, log, erased = self.network, self._log, self.erased
        while pending:
            layer = pending.pop()
            if layer.is_removed or _is_read(layer) or (layer.has_effects and layer not in replaced):
                continue
            log.append((network._restore, (layer, layer._next)))
            network._remove(layer)
            erased.append(layer)
            for tensor in layer._inputs:
                parent = tensor.parent
                if parent is not None and not tensor._uses:
                    pending.append(parent)

    def move(self, layer: Layer, place: Layer | None) -> None:
        self._log.append((self.network._move, (layer, layer._next)))
        self.network._move(layer, place)
        self.moved.append(layer)

    def abandon(self) -> None:
        """Takes back what a rule did that declined or raised before its edit was complete."""
        if not self.added:
            self.collect()
        self.undo()

    def undo(self) -> None:
        """Back to the network as it was before the edit, which may be used again then."""
        network = self.network
        while self._log:
            function, args = self._log.pop()
            function(*args)
        while self.added:
            network.erase(self.added.pop())
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


def _set_type(tensor: Tensor, shape: tuple, dtype: Any) -> None:
    tensor.shape, tensor.dtype = shape, dtype
