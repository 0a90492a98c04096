"""Which ONNX nodes each kernel computes, followed through fusion.

Fusion shares one function between equal groups, so names inside functions cannot be trusted. Instead the fused
program is replayed: every call is unfolded and each operation in it is looked up among the operations before fusion
by its callee and its operands, which stay the same.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, relax

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.llvm.importer import node_index
from cnncc.targets.llvm.schedule.driver import Scheduled
from cnncc_runtime.bundle import LayerRecord

Key = tuple[Any, ...]


def bindings_of(function: Any) -> Iterator[Any]:
    """Yield the variable bindings of a Relax function in order of execution."""
    for block in function.body.blocks:
        yield from block.bindings


@dataclass
class Origins:
    """The operations of one function before fusion.

    Attributes:
        names: Operation (callee and operands) → its results' variables and node indices, in order.
    """

    names: dict[Key, deque[tuple[Any, frozenset[int]]]] = field(default_factory=lambda: defaultdict(deque))


def record_origins(function: Any) -> Origins:
    """Note what every operation of a function computes.

    A converter may emit several operations for a node and the passes may split one; what has no name of its own was
    emitted on the way to the next that has one.
    """
    origins = Origins()
    bindings = list(bindings_of(function))
    index: frozenset[int] = frozenset()
    nodes: dict[int, frozenset[int]] = {}
    for position in range(len(bindings) - 1, -1, -1):
        named = node_index(bindings[position].var)
        if named is not None:
            index = frozenset((named,))
        nodes[position] = index
    for position, binding in enumerate(bindings):
        origins.names[_key(binding.value, {})].append((binding.var, nodes[position]))
    return origins


@dataclass(frozen=True)
class Call:
    """One kernel call of an entry function.

    Attributes:
        kernel: Function that is called.
        nodes: Indices of the ONNX nodes it computes.
        dtype: Element type of its (first) result.
    """

    kernel: str
    nodes: tuple[int, ...]
    dtype: str


def replay(module: Any, entry: str, origins: Origins) -> tuple[Call, ...]:
    """Return the kernel calls of a fused function with the nodes that each computes.

    Args:
        module: The module after ``FuseOps`` and before ``FuseTIR``.
        entry: Name of the function.
        origins: What `record_origins` said of the same function before fusion.
    """
    known: dict[Any, Any] = {}
    calls = []
    for binding in bindings_of(module[entry]):
        value = binding.value
        if isinstance(value, ir.Call) and isinstance(value.op, ir.GlobalVar):
            nodes = _unfold(module[value.op], value, known, origins, binding.var)
            calls.append(Call(value.op.name_hint, tuple(sorted(nodes)), _dtype(binding.var)))
            continue
        original, nodes = _look_up(value, known, origins)
        known[binding.var] = original if original is not None else binding.var
        if kernel := _called(value):
            calls.append(Call(kernel, tuple(sorted(nodes)), _dtype(binding.var)))
    return tuple(calls)


def _unfold(function: Any, call: Any, known: dict[Any, Any], origins: Origins, result: Any) -> frozenset[int]:
    inner = {param: _resolve(arg, known) for param, arg in zip(function.params, call.args, strict=True)}
    nodes: frozenset[int] = frozenset()
    last = None
    for binding in bindings_of(function):
        original, found = _look_up(binding.value, inner, origins)
        nodes |= found
        if original is not None:
            inner[binding.var] = last = original
    body = function.body.body
    known[result] = inner.get(body, last) if not isinstance(body, relax.Tuple) else result
    return nodes


def _look_up(value: Any, known: Mapping[Any, Any], origins: Origins) -> tuple[Any, frozenset[int]]:
    if isinstance(value, relax.Var):
        return known.get(value, value), frozenset()
    found = origins.names.get(_key(value, known))
    if not found:
        return None, frozenset()
    return found.popleft() if len(found) > 1 else found[0]


def _resolve(expr: Any, known: Mapping[Any, Any]) -> Any:
    return known.get(expr, expr) if isinstance(expr, relax.Var) else expr


def _key(expr: Any, known: Mapping[Any, Any]) -> Key:
    """Return what identifies an operation: its callee and its operands, by identity."""
    expr = _resolve(expr, known)
    if isinstance(expr, relax.Var):
        return ("var", expr)
    if isinstance(expr, relax.TupleGetItem):
        return ("item", expr.index, _key(expr.tuple_value, known))
    if isinstance(expr, ir.Call):
        return ("call", _callee(expr.op), *(_key(arg, known) for arg in expr.args))
    if isinstance(expr, relax.Tuple):
        return ("tuple", *(_key(item, known) for item in expr.fields))
    if isinstance(expr, ir.GlobalVar):
        return ("global", expr.name_hint)
    if isinstance(expr, ir.GenericConst):
        return ("constant", expr)
    return ("other", str(expr))


def _callee(op: Any) -> str:
    return str(op.name_hint if isinstance(op, ir.GlobalVar) else getattr(op, "name", op))


def _called(value: Any) -> str:
    """Return the kernel that an unfused call runs, or an empty text where it runs none."""
    if isinstance(value, ir.Call) and value.args and isinstance(value.args[0], ir.GlobalVar):
        return str(value.args[0].name_hint)
    return ""


def _dtype(var: Any) -> str:
    type_ = var.ty
    while isinstance(type_, relax.TupleType):
        type_ = type_.fields[0]
    return str(type_.dtype) if isinstance(type_, relax.TensorType) else ""


def layer_records(
    graph: OnnxGraph, calls: tuple[Call, ...], kernels: Mapping[str, Scheduled]
) -> tuple[LayerRecord, ...]:
    """Return one record per kernel call, in order of execution, in the user's names."""
    nodes = list(graph.nodes)
    return tuple(
        LayerRecord(
            kernel=str(call.kernel),  # TVM's String is a str that JSON encoders refuse
            modules=tuple(dict.fromkeys(module_path(nodes[index]) for index in call.nodes)),
            nodes=tuple(node_label(nodes[index]) for index in call.nodes),
            ops=tuple(nodes[index].op_type for index in call.nodes),
            precision=(kernels[call.kernel].operand if call.kernel in kernels else "") or call.dtype,
            schedule=kernels[call.kernel].rule if call.kernel in kernels else "unscheduled",
        )
        for call in calls
    )
