"""Which operator a PyTorch function means: `F.linear`, `torch.add`, `x + y`, `x.view(…)` and `torch.ops.aten…` alike.

    resolve(F.silu, (x,), {})            # (aten.silu.default, (x,))
    resolve(torch.Tensor.float, (x,), {})  # (aten.to.dtype, (x, torch.float32, False, False, None))

Anything whose class defines `__torch_function__` counts as a tensor, so networks and patterns share one reading of a
call. The choice among overloads is that of torch.export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from numbers import Number
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from enginery.errors import NetworkError
from enginery.network.dim import Dim
from enginery.network.operator import REQUIRED, Operator, Signature, signature

aten = torch.ops.aten
Packet = torch._ops.OpOverloadPacket
Spelling = Callable[[Operator, tuple], tuple[Operator, tuple]]


def resolve(function: Callable, args: tuple, kwargs: Mapping[str, Any] | None = None) -> tuple[Operator, tuple]:
    """The operator that a call of a PyTorch function means, and the call's arguments in normal form.

    A trailing `...` among the positional arguments stands for all arguments that are not given: they become `...` too.
    Raises NetworkError for a function that is no single operator.
    """
    kwargs = kwargs or {}
    missing = None
    if args and args[-1] is ...:
        args, missing = args[:-1], ...
    if function.__class__ is not Operator:
        adapter = _ADAPTERS.get(function)
        if adapter is not None:
            function, args, kwargs = adapter(*args, **kwargs)
    if function.__class__ is Operator:
        plan = _operator_plan(function)
    else:
        named = tuple([(key, kind_of(value)) for key, value in kwargs.items()]) if kwargs else ()
        plan = _plan(function, tuple(map(kind_of, args)), named, missing is not None)
        if plan.pack:
            args = (args[0], args[1:])
    if kwargs and plan.keys:
        kwargs = {plan.keys.get(key, key): value for key, value in kwargs.items() if plan.keys.get(key, key)}
    known = plan.signature
    values = known.normalise(args, kwargs, missing)
    if missing is not None:
        given = {*range(len(args)), *(known.index[name] for name in kwargs)}
        values = tuple(value if i in given else ... for i, value in enumerate(values))
    return (plan.op, values) if plan.spelling is None else plan.spelling(plan.op, values)


class Plan(NamedTuple):
    """How calls of a function with certain kinds of arguments are read."""

    op: Operator
    signature: Signature
    spelling: Spelling | None
    """one spelling for calls that mean the same"""
    pack: bool
    """the sizes are given one by one: `x.view(2, 3)`"""
    keys: Mapping[str, str]
    """the schema's name of an argument; empty: it does not matter"""


def is_value(value: Any) -> bool:
    """A stand-in for a tensor: a network's Tensor, a pattern, a torch.Tensor."""
    return hasattr(type(value), "__torch_function__") and type(value) is not Dim


def kind_of(value: Any) -> Any:
    """What of an argument the choice of an overload depends on.

    A class may declare its `argument_kind`: Number stands for any argument that is no tensor.
    """
    if type(value) in _PLAIN:
        return type(value)
    declared = getattr(type(value), "argument_kind", None)
    if declared is not None:
        return declared
    if isinstance(value, (tuple, list)):
        return (next((kind_of(item) for item in value if item is not None), None),)
    return torch.Tensor if is_value(value) else type(value)


_PLAIN = frozenset({int, float, bool, type(None), str, torch.dtype, Dim, type(...)})
_VARIADIC = frozenset(
    {"view", "reshape", "expand", "permute", "repeat", "tile", "new_zeros", "new_ones", "new_empty", "flip"}
)
_KEYWORDS = MappingProxyType({"axis": "dim", "keepdims": "keepdim"})
_IGNORED = frozenset({"inplace", "_stacklevel", "non_blocking", "requires_grad"})
_OPAQUE = frozenset({"item", "tolist", "numpy", "backward", "data_ptr", "nonzero_static", "apply_", "map_"})


@cache
def _packet(function: Callable) -> Packet:
    name = getattr(function, "__name__", "")
    known = getattr(aten, name, None) if name.isidentifier() and name not in _OPAQUE else None
    if name.endswith("_") and not name.endswith("__"):
        raise NetworkError(f"{name} writes to its argument", f"Use {name.rstrip('_')}")
    if not isinstance(known, Packet) or not _is_torch(function):
        where = getattr(function, "__module__", None) or "torch"
        raise NetworkError(f"{where}.{name or function!r} is no single ATen operator", "Call torch.ops.aten… instead")
    return known


def _is_torch(function: Callable) -> bool:
    module = getattr(function, "__module__", None) or getattr(getattr(function, "__objclass__", None), "__module__", "")
    owner = getattr(function, "__self__", None)
    return str(module).startswith(("torch", "_operator")) or getattr(owner, "__name__", "").startswith("torch")


@cache
def _operator_plan(op: Operator) -> Plan:
    known = signature(op)
    keys = {"input": "self"} if "input" not in known.index and "self" in known.index else {}
    return Plan(op, known, _SPELLINGS.get(op), False, keys)


@cache
def _plan(function: Callable, kinds: tuple, named: tuple, open_ended: bool) -> Plan:
    packet = function if isinstance(function, Packet) else _packet(function)
    pack = packet.__name__ in _VARIADIC and len(kinds) > 1 and kinds[1] in (int, Dim)
    if pack:
        kinds = (kinds[0], (kinds[1],))
    keys = {name: "" if name in _IGNORED else _KEYWORDS.get(name, name) for name, _ in named}
    kept = tuple((keys[name], kind) for name, kind in named if keys[name])
    plan = _operator_plan(_choose(packet, kinds, kept, open_ended))
    changed = {name: key for name, key in keys.items() if name != key}
    return plan._replace(pack=pack, keys={**plan.keys, **changed})


def _choose(packet: Packet, kinds: tuple, named: tuple, open_ended: bool) -> Operator:
    """The overload that fits the kinds of the arguments best."""
    best: Operator | None = None
    best_cost = 1 << 20
    for op in _overloads(packet):
        cost = _cost(signature(op), kinds, named, open_ended)
        if cost is not None and cost < best_cost:
            best, best_cost = op, cost
    if best is None:
        given = ", ".join([*map(_show, kinds), *(f"{name}={_show(kind)}" for name, kind in named)])
        forms = "; ".join(str(op._schema) for op in _overloads(packet))
        raise NetworkError(f"no form of {packet.__name__} takes ({given})", f"It has: {forms}")
    return best


@cache
def _overloads(packet: Packet) -> tuple[Operator, ...]:
    """The functional overloads, without names of dimensions; of arithmetic, those alone that torch.export gives."""
    found = []
    for name in packet.overloads():
        op = getattr(packet, name)
        known = signature(op)
        if known.written or any("Dimname" in text for text in known.types):
            continue
        if packet.__name__ in ("add", "sub", "mul", "div", "true_divide") and name.startswith("Scalar"):
            continue
        if set(known.types) & {"t", "List[t]", "str"} and not any("Tensor" in text for text in known.types):
            continue
        found.append(op)
    return tuple(found)


def _cost(known: Signature, kinds: tuple, named: tuple, open_ended: bool) -> int | None:
    """How badly the kinds fit a signature; None if they do not."""
    if len(kinds) > len(known.names):
        return None
    places = list(enumerate(kinds))
    for name, kind in named:
        place = known.index.get("self" if name == "input" and "input" not in known.index else name)
        if place is None or place < len(kinds):
            return None
        places.append((place, kind))
    total = 0
    for place, kind in places:
        cost = _fit(kind, known.types[place])
        if cost is None or (place < len(kinds) and place in known.keyword_only):
            return None
        total += cost
    given = {place for place, _ in places}
    if not open_ended and any(value is REQUIRED and i not in given for i, value in enumerate(known.defaults)):
        return None
    return total


def _fit(kind: Any, text: str) -> int | None:
    if kind is type(...):
        return 0
    if kind is Number:
        return 9 if "Tensor" in text else 0
    if text.startswith("Optional["):
        return 0 if kind is type(None) else _fit(kind, text[9:-1])
    if kind is torch.Tensor:
        return 0 if text == "Tensor" else 50
    if isinstance(kind, tuple):
        if not text.startswith("List["):
            return None
        return 0 if kind[0] is None else _fit(kind[0], text[5:-1])
    if text.startswith("List["):
        return 1 if text == "List[int]" and kind in (int, Dim) else None
    return _FITS.get((kind, text))


_FITS = MappingProxyType(
    {
        (bool, "bool"): 0,
        (bool, "number"): 1,
        (bool, "int"): 2,
        (bool, "Tensor"): 9,
        (int, "int"): 0,
        (int, "number"): 0,
        (int, "float"): 1,
        (int, "Tensor"): 9,
        (Dim, "int"): 0,
        (Dim, "number"): 0,
        (Dim, "Tensor"): 9,
        (float, "float"): 0,
        (float, "number"): 0,
        (float, "Tensor"): 9,
        (complex, "number"): 0,
        (complex, "Tensor"): 9,
        (str, "str"): 0,
        (str, "Device"): 1,
        (torch.device, "Device"): 0,
        (torch.dtype, "ScalarType"): 0,
        (torch.memory_format, "MemoryFormat"): 0,
        (torch.layout, "Layout"): 0,
    }
)


def _show(kind: Any) -> str:
    return f"[{_show(kind[0])}]" if isinstance(kind, tuple) else getattr(kind, "__name__", str(kind))


# Functions whose arguments differ from those of their operator. Each gives what to resolve instead.

Adapter = Callable[..., tuple[Callable, tuple, Mapping[str, Any]]]


def _converter(dtype: torch.dtype) -> Adapter:
    return lambda self, memory_format=None: (aten.to.dtype, (self, dtype), {})


def _to(self: Any, *args: Any, **kwargs: Any) -> tuple:
    """Devices are not a network's concern: only the dtype of the conversion stays."""
    dtype = kwargs.get("dtype")
    for value in args:
        if is_value(value):
            dtype = getattr(value, "dtype", None)
            if not isinstance(dtype, torch.dtype):
                return aten.type_as.default, (self, value), {}
        elif isinstance(value, torch.dtype):
            dtype = value
    if dtype is None and any(value is ... for value in args):
        dtype = ...
    return (aten.to.dtype, (self, dtype), {}) if dtype is not None else (aten.alias.default, (self,), {})


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> tuple:  # fmt: skip
    if max_norm is not None:
        raise NetworkError("embedding with max_norm writes to its weight")
    return aten.embedding.default, (weight, input, -1 if padding_idx is None else padding_idx), {}


def _split(tensor: Any, split_size_or_sections: Any, dim: int = 0) -> tuple:
    several = isinstance(split_size_or_sections, (tuple, list))
    op = aten.split_with_sizes.default if several else aten.split.Tensor
    return op, (tensor, split_size_or_sections, dim), {}


def _einsum(equation: str, *operands: Any) -> tuple:
    flat = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    return aten.einsum.default, (equation, flat), {}


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple:
    return aten.dropout.default, (input, p, training), {}


def _softmax(operator: Operator) -> Adapter:
    def adapt(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> tuple:
        if dim is None:
            raise NetworkError(f"{operator._schema.name} needs a dim")
        return operator, (input, dim, dtype), {}

    return adapt


def _operator(op: Operator) -> Adapter:
    return lambda *args, **kwargs: (op, args, kwargs)


_ADAPTERS: Mapping[Callable, Adapter] = MappingProxyType(
    {
        torch.Tensor.float: _converter(torch.float32),
        torch.Tensor.double: _converter(torch.float64),
        torch.Tensor.half: _converter(torch.float16),
        torch.Tensor.bfloat16: _converter(torch.bfloat16),
        torch.Tensor.long: _converter(torch.int64),
        torch.Tensor.int: _converter(torch.int32),
        torch.Tensor.bool: _converter(torch.bool),
        torch.Tensor.to: _to,
        torch.Tensor.type: lambda self, dtype: (aten.to.dtype, (self, dtype), {}),
        torch.split: _split,
        torch.Tensor.split: lambda self, split_size, dim=0: _split(self, split_size, dim),
        torch.einsum: _einsum,
        functional.embedding: _embedding,
        functional.dropout: _dropout,
        functional.softmax: _softmax(aten.softmax.int),
        functional.log_softmax: _softmax(aten.log_softmax.int),
        functional.tanh: _operator(aten.tanh.default),
        functional.sigmoid: _operator(aten.sigmoid.default),
    }
)


# Operators that differ in name or in idle arguments only.

_END = torch.iinfo(torch.int64).max


def _renamed(target: Operator) -> Spelling:
    return lambda op, values: (target, values)


def _slice(op: Operator, values: tuple) -> tuple[Operator, tuple]:
    self, dim, start, end, step = values
    start = None if type(start) is int and start == 0 else start
    end = None if type(end) is int and end == _END else end
    return op, (self, dim, start, end, step)


def _without(*names: str) -> Spelling:
    """Arguments that say how or where, not what: back to their defaults."""

    def spell(op: Operator, values: tuple) -> tuple[Operator, tuple]:
        known = signature(op)
        plain = list(values)
        for name in names:
            place = known.index[name]
            plain[place] = ... if plain[place] is ... else known.defaults[place]
        return op, tuple(plain)

    return spell


def _spellings() -> dict[Operator, Spelling]:
    table: dict[Operator, Spelling] = {
        aten.slice.Tensor: _slice,
        aten.layer_norm.default: _without("cudnn_enable"),
        aten.to.dtype: _without("non_blocking", "copy", "memory_format"),
        aten.to.device: lambda op, v: (aten.to.dtype, (v[0], v[2], False, False, None)),
        aten.to.other: lambda op, v: (aten.type_as.default, v[:2]),
        aten.to.dtype_layout: lambda op, v: _plain_cast(v[0], v[1]),
        aten._to_copy.default: lambda op, v: _plain_cast(v[0], v[1]),
        aten.clone.default: _without("memory_format"),
        aten.contiguous.default: _without("memory_format"),
        aten.split.sizes: _renamed(aten.split_with_sizes.default),
        aten.true_divide.Tensor: _renamed(aten.div.Tensor),
    }
    for short, full in (("__and__", "bitwise_and"), ("__or__", "bitwise_or"), ("__xor__", "bitwise_xor")):
        for overload in ("Tensor", "Scalar"):
            table[getattr(getattr(aten, short), overload)] = _renamed(getattr(getattr(aten, full), overload))
    for names in (("multiply", "mul"), ("subtract", "sub"), ("divide", "div")):
        table[getattr(aten, names[0]).Tensor] = _renamed(getattr(aten, names[1]).Tensor)
    for name in ("concat", "concatenate"):
        table[getattr(aten, name).default] = _renamed(aten.cat.default)
    for name in ("swapaxes", "swapdims"):
        table[getattr(aten, name).default] = _renamed(aten.transpose.int)
    idle = ("layout", "device", "pin_memory")
    for packet in ("arange", "full", "zeros", "ones", "empty", "full_like", "zeros_like", "ones_like", "empty_like",
                   "new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor", "linspace", "eye", "rand",
                   "randn", "tril_indices", "triu_indices"):  # fmt: skip
        for overload in getattr(aten, packet).overloads():
            op = getattr(getattr(aten, packet), overload)
            present = tuple(name for name in (*idle, "memory_format") if name in signature(op).index)
            if present and op not in table:
                table[op] = _without(*present)
    return table


def _plain_cast(value: Any, dtype: Any) -> tuple[Operator, tuple]:
    if dtype is None:
        return aten.alias.default, (value,)
    return aten.to.dtype, (value, dtype, False, False, None)


_SPELLINGS: Mapping[Operator, Spelling] = MappingProxyType(_spellings())
