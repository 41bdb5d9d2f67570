"""What rules read at a layer and what they ask for, so that it can be repeated where the same would be read.

While a recording is open, the layers and tensors that the rules have come upon are of classes whose slots note each
read, and so is the network. What rules see and do is the same; only `type(x)` would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.network.tensor import Tensor
from enginery.rewriting.blocks import Block
from enginery.rewriting.view import COUNT, FACTS, INDEX, ORDER, PARENT, USES, Read, View, literal


class New(tuple):
    """In a template: the number of a new layer, and which of its outputs."""


class Old(int):
    """In a template: the number of a layer or tensor in the view."""


class Recording:
    """Of the rules that one layer of a block is offered to. Open it (`with`) around the code of each of them."""

    def __init__(self, block: Block, layer: Layer, is_inside: Callable[[Layer], bool], network: Network) -> None:
        self.view, self.network = block.view(), network
        self.guards: list[tuple[Read, int, Any]] = []
        """each read that the state of the block does not answer: what was read, of which object, and the result"""
        self.calls: list[tuple[Any, tuple, tuple]] = []
        """what the rule in turn appends: operator, template of its arguments, types"""
        self.is_void = False
        """the rules read, or did, something that cannot be repeated"""
        self._is_inside = is_inside
        self._met: dict[Any, None] = {layer: None}
        self._done: set[tuple[Read, Any]] = set()
        self._made: dict[Tensor, New] = {}
        self._appended: set[Layer] = set()
        self._resting = True

    def __enter__(self) -> None:
        self.calls, self._made = [], {}
        self._open()

    def __exit__(self, *_: Any) -> None:
        self._close()
        vars(self.network).pop("_recording", None)

    def _open(self) -> None:
        if not self.is_void:
            self.network._recording = self  # type: ignore[attr-defined]
            self._resting = False
            self._dress(_SeenTensor, _SeenLayer, _SeenNetwork)

    def _close(self) -> None:
        self._resting = True
        self._dress(Tensor, Layer, Network)

    def _dress(self, tensor: type, layer: type, network: type) -> None:
        for thing in self._met:
            _set_class(thing, tensor if isinstance(thing, Tensor) else layer)
        _set_class(self.network, network)

    def end(self) -> None:
        """What comes now cannot be repeated."""
        self._close()
        self.is_void = True

    def read(self, read: Read, thing: Any) -> None:
        """Notes a read, once."""
        if self._resting or (read, thing) in self._done:
            return
        self._done.add((read, thing))
        self._resting = True
        found = self._note(read, thing)
        for other in found:
            if other not in self._met:
                self._met[other] = None
                _set_class(other, _SeenTensor if isinstance(other, Tensor) else _SeenLayer)
        self._resting = False
        if not self._appended.isdisjoint(thing._uses if read is COUNT else found):
            self.end()  # elsewhere it would be read before the rule has appended anything

    def _note(self, read: Read, thing: Any) -> Sequence[Any]:
        """Adds a guard if one is needed. Gives the objects that the rule meets by this read."""
        if read is FACTS:
            if not self._is_inside(thing):
                self._guard(read, thing)
            return (*thing._inputs, *thing.outputs)
        if read is INDEX:
            if thing.parent is None or not self._is_inside(thing.parent):
                self._guard(read, thing)
            return ()
        if read is PARENT:
            if thing.parent is None or not self._is_inside(thing.parent):
                self._guard(read, thing)
            return () if thing.parent is None else (thing.parent,)
        if read is USES:
            producer = thing.parent
            inside = producer is not None and all(map(self._is_inside, (producer, *thing._uses)))
            self._guard(COUNT if inside else USES, thing)
            return tuple(thing._uses)
        self._guard(read, thing)
        return ()

    def _guard(self, read: Read, thing: Any) -> None:
        number, result = self.view.number(thing), read(self.view, thing)
        self.guards.append((read, number, result))
        self.is_void |= result is NotImplemented

    def append(self, op: Any, args: tuple, name: str | None, types: Any) -> Layer:
        """Has the network append a layer, and notes it."""
        self._close()
        try:
            layer = self.network.add_layer(op, args, name=name, types=types)
            self.is_void |= name is not None or types is not None
            known = tuple([(output.shape, output.dtype) for output in layer.outputs])
            number = len(self.calls)
            self.calls.append((op, self.template(args), known))
            self._appended.add(layer)
            self._made.update({output: New((number, i)) for i, output in enumerate(layer.outputs)})
        finally:
            self._open()
        return layer

    def template(self, value: Any) -> Any:
        """The value with Old and New in place of layers and tensors."""
        kind = value.__class__
        if kind is tuple or kind is list:
            return kind([self.template(item) for item in value])
        if kind is dict:
            return {self.template(key): self.template(item) for key, item in value.items()}
        if kind is not Tensor and kind is not Layer:
            return value
        if value in self._made:
            return self._made[value]
        self.is_void |= value not in self._met or value not in self.view
        return Old(self.view.number(value))


def fill(template: Any, view: View, made: list[Layer]) -> Any:
    """The value that a template stands for."""
    kind = template.__class__
    if kind is Old:
        return view.thing(template)
    if kind is New:
        return made[template[0]].outputs[template[1]]
    if kind is tuple or kind is list:
        return kind([fill(item, view, made) for item in template])
    if kind is dict:
        return {fill(key, view, made): fill(item, view, made) for key, item in template.items()}
    return template


# The classes whose slots note what is read. They have the layout of the plain ones, so that objects can change class.

_set_class = object.__dict__["__class__"].__set__
Note = Callable[[Recording, Any], None]


def _of_read(read: Read) -> Note:
    return lambda recording, thing: recording.read(read, thing)


def _known(recording: Recording, thing: Any) -> None:
    """Part of the facts of the layer through which the tensor was met."""


def _end(recording: Recording, thing: Any) -> None:
    recording.end()


def _slot(owner: type, name: str, note: Note) -> property:
    plain, network = owner.__dict__[name], owner.__dict__["network"]

    def read(self: Any) -> Any:
        recording = network.__get__(self)._recording
        if recording._resting:
            return plain.__get__(self)
        note(recording, self)
        value = plain.__get__(self)
        return _in_order(value) if name == "_uses" else value

    return property(read, plain.__set__)


def _in_order(uses: dict[Layer, int]) -> dict[Layer, int]:
    """Use-lists keep the order of edits, which says nothing: rules see that of execution."""
    return {user: uses[user] for user in sorted(uses, key=_order_of)}


_order_of = Layer.__dict__["order"].__get__


def _seen(owner: type, notes: dict[str, Note], **methods: Any) -> Any:
    """A class like its owner with a property for every slot. What is not in `notes` is compared as it is."""
    slots = [slot for slot in owner.__slots__ if slot != "network"]  # type: ignore[attr-defined]
    body = {slot: _slot(owner, slot, notes.get(slot) or _of_read(literal(slot))) for slot in slots}
    return type(owner.__name__, (owner,), {"__slots__": (), "__class__": property(lambda _: owner), **body, **methods})


def _count(tensor: Any) -> int:
    uses = Tensor.__dict__["_uses"].__get__(tensor)
    recording = tensor.network._recording
    if not recording._resting:
        recording.read(COUNT, tensor)
    return len(uses)


_SeenTensor = _seen(
    Tensor,
    {
        "shape": _known, "dtype": _known, "is_constant": _known,
        "index": _of_read(INDEX), "parent": _of_read(PARENT), "_uses": _of_read(USES),
    },
    users=property(lambda self: list(_in_order(self._uses))),
    user_count=property(_count),
)  # fmt: skip
_SeenLayer = _seen(
    Layer,
    {
        **dict.fromkeys(("op", "_args", "_inputs", "outputs", "has_effects", "is_removed"), _of_read(FACTS)),
        "order": _of_read(ORDER), "_previous": _end, "_next": _end,
    },
)  # fmt: skip


class _SeenNetwork(Network):
    """Layers may be appended; whatever else is asked of a network ends the recording."""

    def __getattribute__(self, name: str) -> Any:
        recording = object.__getattribute__(self, "_recording")
        if name not in _OPEN and not recording._resting:
            recording.end()
        return object.__getattribute__(self, name)

    def add_layer(self, op: Any, args: tuple, *, name: str | None = None, types: Any = None) -> Layer:
        return self._recording.append(op, args, name, types)


_OPEN = frozenset({"_guard", "_recording", "add_layer", "call"})
