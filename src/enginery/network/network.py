"""The network: inputs, constants, calls in execution order, outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network import diff, dot, edit, fx, interpreter, parsing, python, text, verify
from enginery.network.dim import Size
from enginery.network.layer import Layer, Provenance
from enginery.network.operator import Operator, Signature, signature
from enginery.network.tensor import Tensor
from enginery.network.types import infer_types

_ORDER_GAP = 1 << 40
APPEND_ONLY = "only be appended to"
"""the guard of a network while a rewrite rule runs"""


class Network:
    """A program of operator calls over values with shapes and dtypes.

    Constants carry no data here: a constant is a name and a type, and layers over constants alone are expressions that
    are evaluated once, when weights are bound. `values` holds the data of those constants that no checkpoint has
    (small tables that the model computes, such as rotary frequencies).
    """

    def __init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._constants: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._layers: dict[str, Layer] = {}
        self._names: dict[str, int] = {}
        self._first: Layer | None = None
        self._last: Layer | None = None
        self._cursor: Layer | None = None
        self._provenance: Provenance | None = None
        self._module_path = ""
        self._guard = ""
        self.values: dict[str, torch.Tensor] = {}
        self.ranges: dict[str, tuple[int, int | None]] = {}
        """least and greatest value of each symbolic size, both included; None: no bound"""

    # Borders

    @classmethod
    def from_module(
        cls, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
    ) -> Network:
        """The network of `module(*args, **kwargs)`, by torch.export; the module may be on the meta device.

        Parameters and buffers become constants under their qualified names (shared ones become one), small tables that
        the model computed keep their values. `dynamic_shapes` is as in torch.export; the names of its Dims become the
        names of the symbolic sizes. Raises NetworkError where the module has no form as a network, naming the
        construct.
        """
        network = cls()
        fx.import_module(network, module, args, kwargs, dynamic_shapes)
        return network

    @classmethod
    def from_exported_program(cls, program: torch.export.ExportedProgram, dynamic_shapes: Any = None) -> Network:
        """As `from_module`, of a program that torch.export gave (before decomposition)."""
        network = cls()
        fx.import_program(network, program, dynamic_shapes)
        return network

    def to_graph_module(self, device: torch.device | None = None) -> torch.fx.GraphModule:
        """A GraphModule whose placeholders are the inputs, then the constants; it returns a tuple of the outputs.

        Symbolic sizes are read off the inputs' shapes once. New tensors (arange, zeros, …) are made on `device`.
        """
        return fx.to_graph_module(self, device)

    @classmethod
    def parse(cls, source: str, *, max_lines: int = parsing.MAX_LINES) -> Network:
        """The network of a text that `str(network)` gave. Types are inferred again and compared.

        Raises NetworkError that names line and layer where the text is no network.
        """
        network = cls()
        parsing.parse(network, source, max_lines=max_lines)
        return network

    def __str__(self) -> str:
        """The text form: stable, complete but for the constants' values, read back by `parse`."""
        return text.write(self)

    def __repr__(self) -> str:
        return f"<Network of {len(self)} layers, {len(self._inputs)} inputs, {len(self._constants)} constants>"

    def to_dot(self) -> str:
        """A drawing in Graphviz' language."""
        return dot.to_dot(self)

    def to_python(self) -> str:
        """Source of a function `network(inputs…, constants)` that makes the same calls."""
        return python.to_python(self)

    # Reading

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self._inputs.values())

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(self._outputs.values())

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._outputs)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return tuple(self._constants.values())

    @property
    def layers(self) -> list[Layer]:
        """All layers in execution order."""
        return list(self)

    def __iter__(self) -> Iterator[Layer]:
        """In execution order. Layers that are added behind the present one while iterating are visited."""
        layer = self._first
        while layer is not None:
            following = layer._next
            if not layer.is_removed:
                yield layer
            layer = layer._next if not layer.is_removed else following

    def __len__(self) -> int:
        return len(self._layers)

    def verify(self) -> None:
        """Raises NetworkError that names the layer if links, order, schemas, types or use-lists are not sound."""
        verify.verify(self)

    def diff(self, other: Network) -> str:
        """What `other` does differently, layer by layer; empty if nothing. Mere renamings of operands are not shown."""
        return diff.diff(self, other)

    def layer(self, name: str) -> Layer:
        """The layer of that name, or the only one whose name ends with `.name`."""
        if name in self._layers:
            return self._layers[name]
        found = [layer for key, layer in self._layers.items() if key.endswith(f".{name}")]
        if len(found) == 1:
            return found[0]
        raise KeyError(f"{len(found) or 'no'} layers are named {name!r}")

    def tensor(self, name: str) -> Tensor:
        """The input, constant or layer output of that name."""
        for table in (self._inputs, self._constants):
            if name in table:
                return table[name]
        stem, _, index = name.rpartition("#")
        layer = self._layers[stem or name]
        return layer.outputs[int(index)] if stem else layer.output

    def copy(self) -> Network:
        """An equal network that shares nothing but the constants' values."""
        network = type(self)()
        edit.copy_into(self, network)
        return network

    # Building

    def add_input(self, name: str, shape: Sequence[Size], dtype: torch.dtype) -> Tensor:
        tensor = Tensor(self, self._claim(name), tuple(shape), dtype, None, 0)
        self._inputs[name] = tensor
        return tensor

    def add_constant(
        self, name: str, shape: Sequence[Size], dtype: torch.dtype, value: torch.Tensor | None = None
    ) -> Tensor:
        """A value known at build time: from the checkpoint under this name, or `value`."""
        tensor = Tensor(self, self._claim(name), tuple(shape), dtype, None, 0)
        tensor.is_constant = True
        self._constants[name] = tensor
        if value is not None:
            self.values[name] = value
        return tensor

    def set_output(self, name: str, tensor: Tensor, *, keep_old: bool = False) -> None:
        """Binds an output name to a value. `keep_old` leaves the record of the former value to the caller."""
        self._require_open()
        former = self._outputs.get(name)
        if former is not None and not keep_old:
            former.output_names = tuple([other for other in former.output_names if other != name])
        self._outputs[name] = tensor
        tensor.output_names += (name,)

    def call(self, op: Operator, /, *args: Any, name: str | None = None, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Appends a call at the cursor (the end, unless inside `inserting_before`); its output, or its outputs.

        Shapes and dtypes are known at once. Raises NetworkError if the arguments do not fit the operator.
        """
        known = signature(op)
        outputs = self.add_layer(op, known.normalise(args, kwargs), name=name).outputs
        return outputs[0] if known.is_single else outputs

    def add_layer(
        self,
        op: Operator,
        args: tuple,
        *,
        name: str | None = None,
        types: Sequence[tuple[tuple[Size, ...], torch.dtype]] | None = None,
    ) -> Layer:
        """As `call`, with arguments in normal form and, if known, the types of the outputs."""
        if self._guard == "not be changed":
            self._require_open()
        known = signature(op)
        if types is None:
            types = infer_types(op, args)
        name = self._claim(name if name is not None else self._name_for(known))
        layer = Layer(self, name, known, op, args)
        if len(types) == 1:
            ((shape, dtype),) = types
            layer.outputs = (Tensor(self, name, shape, dtype, layer, 0),)
        else:
            layer.outputs = tuple(
                [Tensor(self, f"{name}#{i}", shape, dtype, layer, i) for i, (shape, dtype) in enumerate(types)]
            )
        layer._hold_inputs()
        if layer._derives_constant():
            for output in layer.outputs:
                output.is_constant = True
        self._link_before(layer, self._cursor)
        self._layers[name] = layer
        return layer

    def __call__(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Runs the network by references. Inputs in order or by name, constants by name; one output comes bare."""
        order = [tensor.name for tensor in self.inputs]
        values = [*inputs, *(named.pop(name) for name in order[len(inputs) :] if name in named)]
        outputs = interpreter.run(self, values, named)
        return outputs[0] if len(outputs) == 1 else outputs

    def run(
        self, inputs: Sequence[torch.Tensor], constants: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Runs the network by references. `constants` by name; those in `values` need not be given."""
        return interpreter.run(self, inputs, constants or {})

    def erase(self, layer: Layer) -> None:
        """Removes a layer that nobody reads. Raises NetworkError otherwise."""
        self._require_open()
        for output in layer.outputs:
            if output._uses or output.output_names:
                raise NetworkError(f"layer {layer.name} cannot be erased: {output!r} is still used")
        self._remove(layer)

    def remove_constant(self, tensor: Tensor) -> None:
        """Forgets a named constant that nobody reads, and its value. Raises NetworkError otherwise."""
        self._require_open()
        if tensor._uses or tensor.output_names:
            raise NetworkError(f"constant {tensor.name} cannot be removed: it is still used")
        del self._constants[tensor.name]
        self.values.pop(tensor.name, None)

    def rename_output(self, old: str, new: str) -> None:
        """The output keeps its place."""
        self._require_open()
        tensor = self._outputs[old]
        self._outputs = {new if name == old else name: value for name, value in self._outputs.items()}
        tensor.output_names = tuple([new if name == old else name for name in tensor.output_names])

    @contextmanager
    def guarded(self, *, append: bool) -> Iterator[None]:
        """Inside, a change raises NetworkError; layers and constants may be added if `append`."""
        saved = self._guard
        self._guard = APPEND_ONLY if append else "not be changed"
        try:
            yield
        finally:
            self._guard = saved

    def appending_before(self, layer: Layer) -> Appending:
        """`inserting_before(layer)` and `guarded(append=True)` at once: what a rewrite rule runs in."""
        return Appending(self, layer)

    def _require_open(self) -> None:
        if self._guard:
            raise NetworkError(f"the network may {self._guard} here", "A rule returns what replaces its root")

    def prune(self) -> int:
        """Erases the layers that nobody reads and that have no effect; gives their number."""
        return edit.prune(self)

    @contextmanager
    def inserting_before(
        self, layer: Layer | None, *, module_path: str | None = None, provenance: Provenance | None = None
    ) -> Iterator[None]:
        """New layers go right before `layer` (None: to the end) and carry its module path and the given provenance."""
        saved = self._cursor, self._module_path, self._provenance
        self._cursor = layer
        self._module_path = module_path if module_path is not None else layer.module_path if layer else ""
        self._provenance = provenance
        try:
            yield
        finally:
            self._cursor, self._module_path, self._provenance = saved

    def move_before(self, layer: Layer, place: Layer) -> None:
        """Moves a layer in the execution order. The caller keeps definitions before uses (`verify` checks)."""
        self._require_open()
        if layer is not place:
            self._move(layer, place)

    def _remove(self, layer: Layer) -> None:
        layer._release_inputs()
        self._unlink(layer)
        del self._layers[layer.name]
        layer.is_removed = True

    def _restore(self, layer: Layer, place: Layer | None) -> None:
        layer._hold_inputs()
        self._link_before(layer, place)
        self._layers[layer.name] = layer
        layer.is_removed = False

    def _move(self, layer: Layer, place: Layer | None) -> None:
        self._unlink(layer)
        self._link_before(layer, place)

    def _name_for(self, known: Signature) -> str:
        """What a call that is appended now is named after."""
        return f"{self._module_path}.{known.short_name}" if self._module_path else known.short_name

    def _claim(self, name: str) -> str:
        """A name that nothing else has: the given one, or it with a number."""
        count = self._names.get(name)
        if count is None:
            self._names[name] = 0
            return name
        while True:
            count += 1
            candidate = f"{name}_{count}"
            if candidate not in self._names:
                self._names[name] = count
                self._names[candidate] = 0
                return candidate

    def _link_before(self, layer: Layer, place: Layer | None) -> None:
        previous = self._last if place is None else place._previous
        layer._previous, layer._next = previous, place
        if previous is None:
            self._first = layer
        else:
            previous._next = layer
        if place is None:
            self._last = layer
        else:
            place._previous = layer
        low = previous.order if previous is not None else 0
        layer.order = low + _ORDER_GAP if place is None else (low + place.order) // 2
        if layer.order == low:
            self._renumber()

    def _unlink(self, layer: Layer) -> None:
        if layer._previous is None:
            self._first = layer._next
        else:
            layer._previous._next = layer._next
        if layer._next is None:
            self._last = layer._previous
        else:
            layer._next._previous = layer._previous

    def _renumber(self) -> None:
        layer, order = self._first, 0
        while layer is not None:
            order += _ORDER_GAP
            layer.order = order
            layer = layer._next


class Appending:
    """The context of `Network.appending_before`; a class because it is entered for every match of a rule."""

    __slots__ = ("_layer", "_network", "_saved")

    def __init__(self, network: Network, layer: Layer) -> None:
        self._network, self._layer = network, layer

    def __enter__(self) -> None:
        network = self._network
        self._saved = network._cursor, network._module_path, network._provenance, network._guard
        network._cursor, network._module_path, network._provenance = self._layer, self._layer.module_path, None
        network._guard = APPEND_ONLY

    def __exit__(self, *_: Any) -> None:
        network = self._network
        network._cursor, network._module_path, network._provenance, network._guard = self._saved
