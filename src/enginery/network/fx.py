"""The border to torch: an ExportedProgram in, a GraphModule out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec

from enginery.errors import NetworkError
from enginery.network.collection import paused_collection
from enginery.network.dim import Dim, Size
from enginery.network.faketensor import to_size
from enginery.network.functions import resolve
from enginery.network.mutation import Mutations
from enginery.network.operator import Operator, signature
from enginery.network.tensor import Tensor

if TYPE_CHECKING:
    import sympy

    from enginery.network.network import Network

_IDENTITIES = frozenset({"lift_fresh_copy", "lift_fresh", "detach", "detach_", "alias"})
_ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
        "sym_constrain_range_for_size", "_check", "_functional_assert_scalar", "_functional_assert_async",
    }
)  # fmt: skip


def import_module(
    network: Network, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> None:
    """Exports `module(*args, **kwargs)` and adds its calls to an empty network."""
    try:
        with torch.no_grad():
            program = torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise NetworkError(f"{type(module).__name__} cannot be exported: {_explanation(error)}") from error
    import_program(network, program, dynamic_shapes, tied=_tied(module))


def _explanation(error: Exception) -> str:
    """What an error of torch.export says, as one line without its advice to debug torch."""
    text = str(error).strip() or type(error).__name__
    text = text.partition("The error above occurred")[0].replace(
        'For more information, run with TORCH_LOGS="+dynamic".', ""
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    several = "Constraints violated" in lines[0] if lines else False
    return " ".join(lines)[:600] if several else lines[0] if lines else type(error).__name__


def import_program(
    network: Network,
    program: torch.export.ExportedProgram,
    dynamic_shapes: Any = None,
    *,
    tied: Mapping[str, str] | None = None,
) -> None:
    """Adds the calls of a program that torch.export gave, before decomposition, to an empty network.

    `tied` maps names of parameters to the one that they share.
    """
    _Importer(network, program, dynamic_shapes, tied or {}).run()


def _tied(module: torch.nn.Module) -> dict[str, str]:
    """Names of parameters that are the same object as an earlier one, with that one's name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


class _Importer:
    def __init__(
        self, network: Network, program: torch.export.ExportedProgram, dynamic_shapes: Any, tied: Mapping[str, str]
    ) -> None:
        self.program = program
        self.network = network
        self.tied = tied
        self.values: dict[fx.Node, Any] = {}
        self.mutations = Mutations()
        self.symbols = _symbol_names(program, dynamic_shapes)

    def run(self) -> None:
        with paused_collection():
            self._run()

    def _run(self) -> None:
        self._import_ranges()
        specs = {_argument_name(spec): spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.find_nodes(op="placeholder"):
            self.values[node] = self._placeholder(node, specs[node.name])
        self._body(self.program.graph_module, self.values)
        self._import_outputs()

    def _import_ranges(self) -> None:
        for symbol, bounds in self.program.range_constraints.items():
            if symbol in self.symbols:
                upper = bounds.upper
                finite = upper.is_Integer and int(upper) < 1 << 62
                self.network.ranges[self.symbols[symbol]] = (max(1, int(bounds.lower)), int(upper) if finite else None)

    def _placeholder(self, node: fx.Node, spec: InputSpec) -> Any:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return self._literal(value, node)
        shape = self._shape(value)
        if spec.kind == InputKind.USER_INPUT:
            return self.network.add_input(node.name, shape, value.dtype)
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise NetworkError(
                f"input {node.name} is a {spec.kind.name.lower().replace('_', ' ')}, which no network has"
            )
        name = spec.target or node.name
        name = self.tied.get(name, name)
        if name in self.network._constants:
            return self.network._constants[name]
        return self.network.add_constant(name, shape, value.dtype, self._data(spec))

    def _data(self, spec: InputSpec) -> torch.Tensor | None:
        """The value of a constant that no checkpoint holds; None for parameters and for tensors without data."""
        if spec.kind == InputKind.PARAMETER or (spec.kind == InputKind.BUFFER and spec.persistent):
            return None
        name = spec.target or ""
        found = self.program.constants.get(name)
        found = self.program.state_dict.get(name) if found is None else found
        return None if found is None or found.device.type == "meta" else found.detach()

    def _body(self, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
        """Imports the calls of a graph; gives the values that it returns."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, module, values)
            elif node.op == "get_attr":
                values[node] = _attribute(module, node)
            elif node.op == "output":
                return self._argument(node.args[0], values, node)
        raise NetworkError("the program returns nothing")

    def _call(self, node: fx.Node, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
        function = node.target
        if isinstance(function, torch._ops.HigherOrderOperator):
            return self._higher_order(node, values)
        if function is operator.getitem:
            container, index = (self._argument(value, values, node) for value in node.args)
            return container[index]
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) and not isinstance(
            value, torch.Tensor
        ):
            return self._literal(value, node)
        if not isinstance(function, Operator):
            raise NetworkError(
                f"call of {getattr(function, '__name__', function)} at {node.name} has no form in a network"
            )
        if function._opname in _ASSERTIONS:
            return None
        return self._layer(node, function, values)

    def _layer(self, node: fx.Node, function: Operator, values: dict[fx.Node, Any]) -> Any:
        args = tuple(self._argument(value, values, node) for value in node.args)
        kwargs = {name: self._argument(value, values, node) for name, value in node.kwargs.items()}
        for value in (*args, *kwargs.values()):
            if isinstance(value, _Unknown):
                raise NetworkError(f"{node.name} computes with {value}, which is known at run time only")
        module_path = _module_path(node)
        with self.network.inserting_before(None, module_path=module_path):
            if function._opname in _IDENTITIES:
                return args[0]
            if signature(function).written and function.namespace == "aten":
                return self.mutations.apply(self.network, function, args, kwargs, node.name)
            op, arguments = resolve(function, args, kwargs)
            if op is torch.ops.aten.alias.default or (op is torch.ops.aten.dropout.default and not arguments[2]):
                return arguments[0]
            layer = self.network.add_layer(op, arguments, types=self._types(node))
        self.mutations.note(layer)
        return layer.outputs[0] if signature(op).is_single else layer.outputs

    def _types(self, node: fx.Node) -> list[tuple[tuple[Size, ...], torch.dtype]]:
        value = node.meta["val"]
        outputs = value if isinstance(value, (tuple, list)) else [value]
        return [(self._shape(output), output.dtype) for output in outputs]

    def _shape(self, value: torch.Tensor) -> tuple[Size, ...]:
        return tuple(to_size(size, self.symbols) for size in value.shape)

    def _argument(self, value: Any, values: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        if isinstance(value, fx.Node):
            return self.mutations.current(values[value])
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item, values, node) for item in value)
        if isinstance(value, slice):
            raise NetworkError(f"a slice as argument at {node.name} has no form in a network")
        return value

    def _literal(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, torch.SymInt):
            return to_size(value, self.symbols)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            expression = value.node.expr
            if expression.is_Number:
                return float(expression)
            return _Unknown(f"{node.name} = {expression}")
        return value

    def _higher_order(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Regions that only switch gradients or autocast off are inlined."""
        name = getattr(node.target, "__name__", str(node.target))
        args: list[Any] = [values[value] if isinstance(value, fx.Node) else value for value in node.args]
        places = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
        if name not in places:
            raise NetworkError(f"the control flow {name} at {node.name} has no form in a network")
        body = args[places[name]]
        if name == "wrap_with_autocast" and args[2]:
            raise NetworkError(f"autocast at {node.name} is not supported", "Convert the dtypes explicitly")
        inner: dict[fx.Node, Any] = {}
        placeholders = body.graph.find_nodes(op="placeholder")
        for placeholder, value in zip(placeholders, args[places[name] + 1 :], strict=True):
            inner[placeholder] = value
        return self._body(body, inner)

    def _import_outputs(self) -> None:
        specs = self.program.graph_signature.output_specs
        (node,) = self.program.graph.find_nodes(op="output")
        results: Any = node.args[0]
        taken: dict[str, Tensor] = {}
        for result, spec in zip(results, specs, strict=True):
            if spec.kind.name != "USER_OUTPUT":
                raise NetworkError(
                    f"the model changes {spec.target}", "Export it without a cache that it updates in place"
                )
            if result is None:
                continue
            value = self.mutations.current(self.values[result]) if isinstance(result, fx.Node) else result
            if not isinstance(value, Tensor):
                raise NetworkError(f"the output {result} is no tensor")
            name = "output" if len(specs) == 1 else f"output_{len(taken)}"
            taken[name] = value
            self.network.set_output(name, value)
        self.network.prune()


class _Unknown:
    """A symbolic number that only assertions read; an error if a layer does."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _argument_name(spec: InputSpec) -> str:
    return spec.arg.name


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _symbol_names(program: torch.export.ExportedProgram, dynamic_shapes: Any) -> dict[sympy.Symbol, str]:
    """The names of the program's symbols: of the torch.export.Dims given, else s0, s1, …"""
    names: dict[sympy.Symbol, str] = {}
    tensors = [
        node.meta["val"]
        for node, spec in zip(
            program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True
        )
        if spec.kind == InputKind.USER_INPUT
    ]
    specs = _flat_specs(dynamic_shapes, len(tensors))
    for tensor, spec in zip(tensors, specs, strict=True):
        if not isinstance(tensor, torch.Tensor):
            continue
        for axis, size in enumerate(tensor.shape):
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            if expression is None or not expression.is_Symbol:
                continue
            given = (
                spec.get(axis)
                if isinstance(spec, Mapping)
                else spec[axis]
                if isinstance(spec, Sequence) and spec
                else None
            )
            name = getattr(given, "__name__", None)
            if expression not in names or name is not None:
                names[expression] = name or names.get(expression) or f"s{len(names)}"
    for symbol in sorted(program.range_constraints, key=str):
        if symbol.name.startswith("s"):
            names.setdefault(symbol, f"s{len(names)}")
    return names


def _flat_specs(dynamic_shapes: Any, count: int) -> list[Any]:
    """The per-tensor specs of a nested `dynamic_shapes`, one per user input."""
    if dynamic_shapes is None:
        return [None] * count
    flat: list[Any] = []

    def visit(value: Any) -> None:
        is_spec = value is None or (
            isinstance(value, (Mapping, Sequence))
            and all(not isinstance(item, (Mapping, Sequence)) or isinstance(item, str) for item in _items(value))
            and ((isinstance(value, Mapping) and all(isinstance(key, int) for key in value)) or _is_dims(value))
        )
        if is_spec:
            flat.append(value)
            return
        for item in _items(value):
            visit(item)

    visit(dynamic_shapes)
    return flat if len(flat) == count else [None] * count


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value)


def _is_dims(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        item is None or isinstance(item, int) or hasattr(item, "__name__") for item in value
    )


def _module_path(node: fx.Node) -> str:
    """`model.layers.0.self_attn`: the innermost module that made the call."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    if path.startswith("_empty"):
        return ""
    parts = [
        part for part in path.replace("L['self'].", "").split(".") if part and part != "L['self']" and "@" not in part
    ]
    return ".".join(parts)


def to_graph_module(network: Network, device: torch.device | None = None) -> fx.GraphModule:
    """The network as a GraphModule whose placeholders are its inputs, then its constants; it returns a tuple of the
    outputs.

    Symbolic sizes are read off the inputs' shapes once. New tensors are made on `device`.
    """
    graph = fx.Graph()
    nodes: dict[Tensor, fx.Node] = {}
    for tensor in (*network.inputs, *network.constants):
        nodes[tensor] = graph.placeholder(tensor.name.replace(".", "_"))
    sizes = _SymbolNodes(graph, nodes, network)

    def argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return nodes[value]
        if isinstance(value, Dim):
            return sizes.node(value)
        return [argument(item) for item in value] if isinstance(value, tuple) else value

    for layer in network:
        known = signature(layer.op)
        values = [argument(value) for value in layer.args]
        named = {known.names[i]: values[i] for i in sorted(known.keyword_only) if layer.args[i] != known.defaults[i]}
        if device is not None and "device" in known.index and not layer.inputs:
            named["device"] = device
        plain = [value for i, value in enumerate(values) if i not in known.keyword_only]
        node = graph.create_node("call_function", layer.op, tuple(plain), named, name=layer.name.replace(".", "_"))
        if known.is_single:
            nodes[layer.outputs[0]] = node
            continue
        for output in layer.outputs:
            if output._uses or output.output_names:
                nodes[output] = graph.call_function(operator.getitem, (node, output.index))
    graph.output(tuple(nodes[tensor] for tensor in network.outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


class _SymbolNodes:
    """Makes the nodes that compute symbolic sizes, each once."""

    def __init__(self, graph: fx.Graph, nodes: Mapping[Tensor, fx.Node], network: Network) -> None:
        self.graph = graph
        self.made: dict[Any, Any] = {}
        for tensor in network.inputs:
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, Dim) and size.name is not None and size.name not in self.made:
                    self.made[size.name] = graph.call_function(torch.ops.aten.sym_size.int, (nodes[tensor], axis))

    def node(self, size: Size) -> Any:
        if isinstance(size, int):
            return size
        if size not in self.made:
            self.made[size] = self._sum(size)
        return self.made[size]

    def _sum(self, size: Dim) -> Any:
        total: Any = None
        for atoms, factor in size.terms.items():
            term: Any = factor
            for atom in atoms:
                term = (
                    self._atom(atom) if term == 1 else self.graph.call_function(operator.mul, (term, self._atom(atom)))
                )
            total = term if total is None else self.graph.call_function(operator.add, (total, term))
        return total

    def _atom(self, atom: Any) -> Any:
        if isinstance(atom, str):
            if atom not in self.made:
                raise NetworkError(f"no input has the size {atom}, so it cannot be read off")
            return self.made[atom]
        name, left, right = atom
        function: Callable = {
            "//": operator.floordiv, "%": operator.mod, "min": torch.sym_min, "max": torch.sym_max,
        }[name]  # fmt: skip
        return self.graph.call_function(function, (self.node(left), self.node(right)))


__all__ = ["import_module", "import_program", "to_graph_module"]
