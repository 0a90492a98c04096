"""ONNX to Relax, with every binding named after the node it came from.

TVM's importer stops at the first node that it cannot convert. Here a refused node is noted, its outputs are stood in
for, and the import goes on, so a user sees all of them at once.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import onnx
import tvm_ffi
from tvm import ir, relax
from tvm.ir import Call
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_batch
from cnncc.targets.base import NodeIssue
from cnncc.targets.llvm.converters import CONVERTERS, FLOAT32_ONLY
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.support import first_line, static_issues
from cnncc_runtime.errors import BuildFailed, UnsupportedGraph

_HINT = "node{}_"
_HINTED = re.compile(r"^node(\d+)_(_?\d+)?$")


def node_index(var: Any) -> int | None:
    """Return the index of the ONNX node that a Relax variable was named after, or None."""
    match = _HINTED.match(var.name)
    return int(match.group(1)) if match else None


def import_graph(graph: OnnxGraph, entry: str) -> Any:
    """Convert an ONNX graph to a Relax module with one function.

    Args:
        graph: The graph, of static shapes; weights become constants of the function.
        entry: Name of the function.

    Returns:
        An ``IRModule``; its variables are named after nodes (see `node_index`).

    Raises:
        UnsupportedGraph: Lists every node that could not be converted.
    """
    if issues := static_issues(graph):
        raise refusal(issues)
    importer = _Importer(graph)
    with quiet():
        module = importer.run()
    if importer.issues:
        raise refusal(tuple(importer.issues))
    return _renamed(module, entry)


def _renamed(module: Any, entry: str) -> Any:
    """Return the module with its function under another name.

    Some converters make kernels of their own; where there are several entries, those get the entry's name too, so that
    modules can be put together.
    """
    if entry == "main":
        return module
    kernels = {
        var: ir.GlobalVar(f"{var.name_hint}_{entry}") for var in module.get_global_vars() if var.name_hint != "main"
    }
    main = tvm_ffi.structural_map(module["main"], [(ir.GlobalVar, lambda var: kernels.get(var, var))], order="post")
    functions = {ir.GlobalVar(entry): main.with_attr("global_symbol", entry)}
    functions.update({new: module[old] for old, new in kernels.items()})
    return type(module)(functions)


def refusal(issues: tuple[NodeIssue, ...]) -> UnsupportedGraph:
    """Return the error that lists nodes which cannot be built."""
    count = "1 node" if len(issues) == 1 else f"{len(issues)} nodes"
    return UnsupportedGraph(
        f"the llvm target cannot build {count} of this graph",
        where=[str(issue) for issue in issues],
        hint="replace these operators in the model, or compile for another target (`cnncc targets`)",
    )


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, which names bindings, prefers our converters and goes on after a refused node."""

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__({spec.name: list(spec.shape) for spec in graph.inputs}, None, sanitize=False)
        self._graph = graph
        self._index = 0
        self._stand_ins: dict[str, onnx.ValueInfoProto] | None = None
        self.issues: list[NodeIssue] = []

    def run(self) -> Any:
        return self.from_onnx(self._graph.proto.graph, self._graph.opset)

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Nothing to do: `static_issues` has refused them, all at once."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for self._index, node in enumerate(graph.node):
            try:
                super()._construct_nodes(SimpleNamespace(node=[node]))
            except Exception as exc:  # converters raise anything, AssertionError and TVMError among them
                reason = f"TVM's importer failed: {first_line(exc)}"
                self.issues.append(NodeIssue(module_path(node), node_label(node), node.op_type, reason))
                self._stand_in(node, exc)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int) -> Any:
        attrs.setdefault("tvm_custom", {})
        if op_name in CONVERTERS:
            value = CONVERTERS[op_name](self.bb, inputs, attrs, opset)
            if isinstance(value, relax.Expr):
                value = self.bb.normalize(value)
        elif op_name in FLOAT32_ONLY and str(inputs[0].ty.dtype) == "float16":
            wide = self.bb.normalize(relax.op.astype(inputs[0], "float32"))
            made = self.bb.normalize(super()._convert_operator(op_name, [wide, *inputs[1:]], attrs, opset))
            value = self.bb.normalize(relax.op.astype(made, "float16"))
        else:
            value = super()._convert_operator(op_name, inputs, attrs, opset)
        if isinstance(value, Call) and isinstance(value.ty, relax.TensorType | relax.TupleType):
            value = self.bb.emit(value, name_hint=_HINT.format(self._index))
        return value

    def _stand_in(self, node: onnx.NodeProto, cause: Exception) -> None:
        """Give a refused node outputs of the right type, so that the nodes after it can be looked at."""
        for name in node.output:
            value = self._known_types().get(name)
            if value is None:
                raise refusal(tuple(self.issues)) from cause
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            if not all(shape):
                raise refusal(tuple(self.issues)) from cause
            self._nodes[name] = self.bb.emit(relax.op.zeros(relax.ShapeExpr(shape), dtype))

    def _known_types(self) -> dict[str, onnx.ValueInfoProto]:
        if self._stand_ins is None:
            inferred = onnx.shape_inference.infer_shapes(self._graph.proto)
            self._stand_ins = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.output)}
        return self._stand_ins


def unconvertible(graph: OnnxGraph) -> tuple[NodeIssue, ...]:
    """List every node that cannot be converted, by trying to convert the graph.

    Raises:
        BuildFailed: The importer broke outside any node.
    """
    if issues := static_issues(graph):
        return issues
    if any(spec.symbols for spec in graph.inputs):
        graph = bind_batch(graph, 1)
    importer = _Importer(graph)
    try:
        with quiet():
            importer.run()
    except UnsupportedGraph:
        pass
    except Exception as exc:
        raise BuildFailed(f"TVM's ONNX importer failed: {first_line(exc)}") from exc
    return tuple(importer.issues)
