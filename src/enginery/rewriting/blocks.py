"""Repeated blocks of a network, such as decoder layers, and which of them are in the same state.

A block knows its objects by number: its layers in execution order, what they read and make. Two blocks start in the
same state if they are equal in these terms, and stay so as long as the same changes are made to them in the same
order. Blocks in the same state thus are equal, without being compared again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

from enginery.network.layer import Layer
from enginery.network.network import Network
from enginery.rewriting.edit import Edit
from enginery.rewriting.expectations import block_of
from enginery.rewriting.view import View, facts, same_facts

FEWEST = 3
"""equal blocks that are worth following"""
KINDS = 8
"""of blocks with the same operators that are told apart"""


class State:
    """Of blocks that were equal and to which the same was done."""

    __slots__ = ("_after", "answers")

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        """what is remembered of blocks in this state, by the number of a layer"""
        self._after: dict[Hashable, State] = {}

    def after(self, change: Hashable) -> State:
        if change not in self._after:
            self._after[change] = State()
        return self._after[change]


class Block:
    __slots__ = ("numbers", "objects", "state")

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[Any, int] = {}
        self.state: State | None = None
        """None: no other is like it any more"""

    @property
    def answers(self) -> dict[int, Any]:
        """Those of its state."""
        return self.state.answers if self.state is not None else {}

    def view(self) -> View:
        return View(self.objects, self.numbers)

    def place(self, layer: Layer) -> tuple[int, ...]:
        """The numbers of a layer and of what it reads and makes; they have numbers from now on."""
        numbers, objects = self.numbers, self.objects
        found = []
        for thing in (layer, *layer._inputs, *layer.outputs):
            number = numbers.get(thing)
            if number is None:
                number = numbers[thing] = len(objects)
                objects.append(thing)
            found.append(number)
        return tuple(found)


class Blocks:
    """The repeated blocks of a network, kept up with its changes."""

    def __init__(self, network: Network) -> None:
        self._of: dict[Layer, Block] = {}
        for several in _candidates(network):
            for _ in range(KINDS):
                several = self._gather(several)

    def _gather(self, several: list[list[Layer]]) -> list[list[Layer]]:
        """Puts the first and those that are equal to it into one state, if they are enough. Gives the others."""
        if len(several) < FEWEST:
            return []
        first, *rest = several
        pattern = Block()
        places = [pattern.place(layer) for layer in first]
        equal, others = [(pattern, first)], []
        for layers in rest:
            block = Block()
            if all(
                block.place(layer) == place and same_facts(layer, known)
                for layer, known, place in zip(layers, first, places, strict=True)
            ):
                equal.append((block, layers))
            else:
                others.append(layers)
        if len(equal) >= FEWEST:
            state = State()
            for block, layers in equal:
                block.state = state
                self._of.update(dict.fromkeys(layers, block))
        return others

    def of(self, layer: Layer) -> Block | None:
        return self._of.get(layer)

    def dissolve(self) -> None:
        """Nothing is known of the network any more."""
        self._of.clear()

    def note(self, edit: Edit) -> None:
        """Follows a change of no type: each block that it touched goes over to another state."""
        of = self._of
        home = of.get(edit.root)
        changes: dict[Block, list[Hashable]] = defaultdict(list)
        if home is not None:
            what = edit.answer or tuple([facts(layer) for layer in edit.added])
            changes[home] += ["root", home.numbers[edit.root], what]
            for layer in edit.added:
                of[layer] = home
                changes[home].append(home.place(layer))
        for layer in edit.rebound:
            block = of.get(layer)
            if block is not None and not layer.is_removed:
                changes[block].append(block.place(layer))
        for layer in edit.erased:
            block = of.get(layer)
            if block is not None:
                changes[block].append(block.numbers[layer])
        for block, change in changes.items():
            if block.state is not None:
                block.state = block.state.after(tuple(change))
        for layer in edit.moved:
            block = of.get(layer)
            if block is not None:
                block.state = None


def _candidates(network: Network) -> Iterable[list[list[Layer]]]:
    """Groups of blocks that have the same operators in the same order."""
    members: dict[str, list[Layer]] = defaultdict(list)
    names: dict[str, str] = {}
    for layer in network:
        path = layer.module_path
        if path not in names:
            names[path] = block_of(path)
        members[names[path]].append(layer)
    members.pop("", None)
    alike: dict[tuple, list[list[Layer]]] = defaultdict(list)
    for layers in members.values():
        alike[tuple([id(layer.op) for layer in layers])].append(layers)
    return alike.values()
