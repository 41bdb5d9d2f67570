"""One call of an operator in a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from enginery.errors import NetworkError
from enginery.network.kind import LayerKind, kind_of
from enginery.network.operator import Operator, Signature, draws, freeze, operator_name, signature
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    from enginery.network.network import Network


class Provenance(NamedTuple):
    """Where a layer comes from, if not from the import: the rule that made it and the layers it stands for."""

    rule: str
    replaced: tuple[str, ...]


class Layer:
    """`args` holds a value for every argument of the schema, in its order: tensors, numbers, sizes, dtypes, tuples.

    Made by `Network.call` only.
    """

    __slots__ = (
        "_args", "_inputs", "_next", "_previous", "has_effects", "is_removed", "module_path", "name", "network", "op",
        "order", "outputs", "provenance",
    )  # fmt: skip

    def __init__(self, network: Network, name: str, known: Signature, op: Operator, args: tuple) -> None:
        self.network = network
        self.name = name
        self.op = op
        self._args = args
        self._inputs = inputs_of(args)
        self.has_effects = known.has_effects and _affects(known, op, args)
        """It writes to an argument or draws random numbers: it may not be moved, merged or removed."""
        self.outputs: tuple[Tensor, ...] = ()
        self.module_path = network._module_path
        """the module of the source model that made this call, such as `model.layers.0.self_attn`"""
        self.provenance: Provenance | None = network._provenance
        self.is_removed = False
        self.order = 0
        """grows along the execution order; compare only"""
        self._previous: Layer | None = None
        self._next: Layer | None = None

    @property
    def kind(self) -> LayerKind:
        """The coarse class, by which rules may filter."""
        return kind_of(self.op)

    @property
    def args(self) -> tuple:
        return self._args

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument of the call by its name in the op's schema, omitted ones with their defaults."""
        return dict(zip(signature(self.op).names, self._args, strict=True))

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments, in order, lists flattened; one that is used twice stands twice."""
        return list(self._inputs)

    @property
    def output(self) -> Tensor:
        """The only output."""
        (output,) = self.outputs
        return output

    @property
    def users(self) -> list[Layer]:
        found = {user: None for output in self.outputs for user in output._uses}
        return sorted(found, key=lambda layer: layer.order)

    @property
    def is_constant(self) -> bool:
        """All its inputs are known at build time, so its outputs are."""
        return bool(self.outputs) and self.outputs[0].is_constant

    def replace(self, /, **changes: Any) -> Tensor | tuple[Tensor, ...]:
        """The same call with some arguments changed, appended at the network's cursor; its output, or its outputs."""
        known = signature(self.op)
        args = list(self._args)
        for name, value in changes.items():
            if name not in known.index:
                raise NetworkError(
                    f"{operator_name(self.op)} has no argument {name!r}", f"It has: {', '.join(known.names)}"
                )
            args[known.index[name]] = freeze(value)
        layer = self.network.add_layer(self.op, tuple(args))
        return layer.outputs[0] if known.is_single else layer.outputs

    def matches(self, pattern: Any) -> bool:
        """A pattern of `enginery.rewriting` matches with this layer as its root."""
        return pattern.match(self) is not None

    def replace_input(self, old: Tensor, new: Tensor) -> None:
        """This layer reads `new` wherever it read `old`."""
        count = old._uses.get(self)
        if count is None or old is new:
            return
        self.network._require_open()
        del old._uses[self]
        new._uses[self] = new._uses.get(self, 0) + count
        self._args = tuple(
            [
                new if value is old else _substitute(value, old, new) if value.__class__ is tuple else value
                for value in self._args
            ]
        )
        self._inputs = tuple([new if value is old else value for value in self._inputs])
        if new.is_constant != old.is_constant:
            self.update_constness()

    def set_argument(self, name: str, value: Any) -> None:
        names = signature(self.op).names
        index = names.index(name)
        self._set_args((*self._args[:index], value, *self._args[index + 1 :]))

    def _set_args(self, args: tuple) -> None:
        self.network._require_open()
        self._release_inputs()
        self._args = args
        self._inputs = inputs_of(args)
        known = signature(self.op)
        self.has_effects = known.has_effects and _affects(known, self.op, args)
        self._hold_inputs()
        self.update_constness()

    def _hold_inputs(self) -> None:
        for tensor in self._inputs:
            uses = tensor._uses
            uses[self] = uses[self] + 1 if self in uses else 1

    def _release_inputs(self) -> None:
        for tensor in self._inputs:
            uses = tensor._uses
            count = uses[self]
            if count == 1:
                del uses[self]
            else:
                uses[self] = count - 1

    def _derives_constant(self) -> bool:
        """What `is_constant` of the outputs must be."""
        if self.has_effects:
            return False
        for tensor in self._inputs:  # noqa: SIM110  (a hot loop)
            if not tensor.is_constant:
                return False
        return True

    def update_constness(self) -> None:
        """Derives `is_constant` of the outputs from the inputs, and of all that follows if it changed."""
        pending = [self]
        while pending:
            layer = pending.pop()
            constant = layer._derives_constant()
            if layer.outputs and layer.outputs[0].is_constant != constant:
                for output in layer.outputs:
                    output.is_constant = constant
                    pending.extend(output._uses)

    def __repr__(self) -> str:
        return f"<{self.name} = {operator_name(self.op)}>"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument value, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def base_of(tensor: Tensor) -> Tensor:
    """The value that a value is a view of, or may be: the end of the chain of views. Itself, if it is none."""
    while tensor.parent is not None:
        place = signature(tensor.parent.op).aliased
        if place is None or tensor.parent._args[place].dtype != tensor.dtype:
            break
        tensor = tensor.parent._args[place]
    return tensor


def _affects(known: Signature, op: Operator, args: tuple) -> bool:
    return bool(known.written) or draws(op, args)


def inputs_of(args: tuple) -> tuple[Tensor, ...]:
    """The tensors among the arguments of a call, lists flattened."""
    found: list[Tensor] = []
    for value in args:
        if value.__class__ is Tensor:
            found.append(value)
        elif value.__class__ is tuple:
            found.extend([item for item in value if item.__class__ is Tensor])
    return tuple(found)


def _substitute(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if value.__class__ is tuple:
        return tuple([_substitute(item, old, new) for item in value])
    return value
