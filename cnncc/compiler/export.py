"""`Model` → `OnnxGraph`: through `torch.export`, then the dynamo ONNX exporter.

Opset 18 is what the dynamo exporter's own functions are written in: any other number runs onnx's version converter
over the result. ONNX Runtime, TVM's Relax frontend and TensorRT's parser (10.x, 11, RTX) all read it.
The exporter's optimizer stays off: it folds and fuses unproven, and cnncc's passes do the same with a proof.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from cnncc.compiler.factory import user_place
from cnncc.compiler.ingest import Model, is_dynamic
from cnncc.compiler.model_reference import BATCH
from cnncc.compiler.quiet import quiet
from cnncc.graph.names import exporter_module_path, place, set_module_path
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_shapes, name_nodes
from cnncc.graph.values import all_nodes, inlined, rename_values, values_in_use
from cnncc_runtime.errors import ExportFailed, ModelRefused, UnsupportedGraph
from cnncc_runtime.specs import TensorSpec

OPSET = 18
"""See the module's docstring."""

_TRACED_BATCH = 2  # torch.export specializes on 0 and 1


@dataclass(frozen=True, eq=False)
class Exported:
    """What an export made.

    Attributes:
        graph: The ONNX graph, as exported: not cleaned.
        program: The program it came from.
    """

    graph: OnnxGraph
    program: ExportedProgram

    def save_program(self, path: Path) -> None:
        """Write the program as a ``.pt2`` archive.

        Raises:
            ExportFailed: Torch cannot write it.
            OSError: The file cannot be written.
        """
        try:
            archive = io.BytesIO()  # torch's own file writer aborts the process on a full disk
            with quiet():
                torch.export.save(self.program, archive)
        except Exception as exc:  # torch's serializer raises anything
            raise ExportFailed(f"torch cannot save the program: {_first_line(exc)}") from exc
        path.write_bytes(archive.getbuffer())


def export(model: Model) -> Exported:
    """Export a model of PyTorch to ONNX: one that is no graph already.

    Inputs bear the names of forward's parameters. A single output tensor is called ``output``; tuples and lists give
    ``output_0``, ``output_1``, …, dicts their keys. A symbolic batch is called ``N``.

    Returns:
        The graph, its bytes a function of the model alone, and the program.

    Raises:
        ExportFailed: PyTorch cannot export the module; names module, operator and the user's line.
        ModelRefused: An output is not a tensor.
        UnsupportedGraph: The module computes in bfloat16.
    """
    program = model.program or export_program(model)
    fed = {spec.name for spec in model.inputs}
    names = [f"{name}_output" if name in fed else name for name in _output_names(program)]
    proto = _to_onnx(program)
    proto = inlined(proto)
    _describe_nodes(proto)
    _refuse_bfloat16(proto)
    _strip(proto)
    _name_symbols(proto)
    _name_interface(proto, [spec.name for spec in model.inputs], names)
    name_nodes(proto.graph)
    graph = bind_shapes(OnnxGraph(proto), model.inputs)
    return Exported(graph, program)


def export_program(model: Model) -> ExportedProgram:
    """Trace the module with `torch.export`.

    Raises:
        ExportFailed: The module has control flow that depends on data, or the like.
    """
    module = model.module
    assert module is not None
    examples = [_example(spec) for spec in model.inputs]
    args, kwargs = _as_call(module, model.inputs, examples)
    shapes = None
    if is_dynamic(model.inputs):
        batch = torch.export.Dim(BATCH, min=1)
        dims = [{0: batch} if BATCH in spec.symbols else None for spec in model.inputs]
        shapes = (*dims[: len(args)],) if not kwargs else _shapes_by_name(module, model.inputs, dims)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as exc:  # torch.export lets the module's own exceptions through
        raise _trace_failed(exc, module, model.inputs) from exc


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [_TRACED_BATCH if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _as_call(
    module: nn.Module, inputs: tuple[TensorSpec, ...], examples: list[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Give the inputs by position as far as forward's parameters go in order, the others by name."""
    import inspect

    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    order = [p.name for p in parameters if p.kind in positional]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple(examples), {}
    count = 0
    while count < min(len(inputs), len(order)) and inputs[count].name == order[count]:
        count += 1
    return tuple(examples[:count]), {spec.name: x for spec, x in zip(inputs[count:], examples[count:], strict=True)}


def _shapes_by_name(module: nn.Module, inputs: tuple[TensorSpec, ...], dims: list[Any]) -> dict[str, Any]:
    return {spec.name: dim for spec, dim in zip(inputs, dims, strict=True)}


# ---- failures, in the user's terms


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[0]) if lines else type(exc).__name__


def _trace_failed(exc: Exception, module: nn.Module, inputs: tuple[TensorSpec, ...]) -> ExportFailed:
    names = {id(child): path or "(model)" for path, child in module.named_modules()}
    where = [*_failing_module(exc, names), *user_place(exc)]
    kind, text = type(exc).__name__, _first_line(exc)
    if "DataDependent" in kind or "data-dependent" in text:
        message = "the model branches on the values of a tensor, which a compiled graph cannot do"
        hint = "replace the branch by torch.where, or take it out of forward"
    elif "Constraint" in kind or "ConstraintViolation" in str(exc) or "specialized" in str(exc):
        message = f"the model does not work for every batch size: {_constraint(exc)}"
        hint = "give a number instead of N in --input-shape"
    else:
        given = "; ".join(map(str, inputs))
        message = f"the model fails when traced with {given}: {kind}: {text}"
        hint = "check --input-shape and --input-dtype, and that forward takes tensors alone"
    return ExportFailed(message, where=where, hint=hint)


def _constraint(exc: Exception) -> str:
    lines = [line.strip(" -") for line in str(exc).splitlines() if "specialized" in line or "inferred" in line]
    return lines[0] if lines else _first_line(exc)


def _failing_module(exc: BaseException, names: dict[int, str]) -> Iterator[str]:
    """Yield the innermost module whose forward is on the stack."""
    found = ""
    tb = exc.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if id(owner) in names:
            found = f"{names[id(owner)]} ({type(owner).__name__})"
        tb = tb.tb_next
    if found:
        yield found


def _to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                keep_initializers_as_inputs=False,
            )
            assert made is not None
            return made.model_proto
    except Exception as exc:  # the exporter wraps some failures and not others
        raise _conversion_failed(exc, program) from exc


def _conversion_failed(exc: Exception, program: ExportedProgram) -> ExportFailed:
    chain: list[BaseException] = []
    link: BaseException | None = exc
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = "\n".join(str(item) for item in chain)
    operators = re.findall(r"OpOverload\(op='([\w.:]+)'", text) or re.findall(r"torch\.ops\.([\w.]+)", text)
    where = list(_places_of(operators[0], program)) if operators else []
    what = f"operator {operators[0]}" if operators else "the program"
    reason = _first_line(chain[-1])
    return ExportFailed(
        f"ONNX has no form for {what}: {type(chain[-1]).__name__}: {reason}",
        where=where,
        hint="write that part of the model with operators that ONNX has, or leave it out of forward",
    )


def _places_of(operator: str, program: ExportedProgram) -> Iterator[str]:
    plain = operator.replace("::", ".")
    for node in program.graph.nodes:
        target = str(node.target)
        if node.op == "call_function" and (
            target == plain or target.split(".default")[0] == plain.split(".default")[0]
        ):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = stack[-1][0] if stack else ""
            yield f"{path or '(model)'} ({target})"


# ---- names and privacy


def _describe_nodes(proto: onnx.ModelProto) -> None:
    for node in all_nodes(proto.graph):
        path = exporter_module_path(node)
        del node.metadata_props[:]
        if path is not None:
            set_module_path(node, path)


def _refuse_bfloat16(proto: onnx.ModelProto) -> None:
    """Refuse what opset 18 has no operators for, by module, before shape inference says it in its own terms."""
    kind = onnx.TensorProto.BFLOAT16
    weights = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == kind}
    where = [
        place(node)
        for node in all_nodes(proto.graph)
        if weights.intersection(node.input) or any(a.name == "to" and a.i == kind for a in node.attribute)
    ]
    if where:
        raise UnsupportedGraph(
            f"{len(where)} operators compute in bfloat16, which engines do not take",
            where=where,
            hint="take autocast out of forward, or return the module as float32 (`module.float()`)",
        )


def _strip(proto: onnx.ModelProto) -> None:
    """Drop what says where and when the model was exported: stack traces, paths, notes."""
    del proto.metadata_props[:]
    proto.ClearField("doc_string")
    graph = proto.graph
    graph.name = "main_graph"
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.ClearField("doc_string")
        del item.metadata_props[:]
    for node in all_nodes(graph):
        node.ClearField("doc_string")


def _name_symbols(proto: onnx.ModelProto) -> None:
    """Call the batch ``N`` instead of the exporter's ``s77``; drop expressions, which inference finds again."""
    own = {
        dim.dim_param for value in proto.graph.input for dim in value.type.tensor_type.shape.dim[:1] if dim.dim_param
    }
    if len(own) != 1:
        return
    (symbol,) = own
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = BATCH
            elif dim.dim_param and value in proto.graph.output:
                dim.Clear()


def _output_names(program: ExportedProgram) -> list[str]:
    """Name the output tensors by their place in what forward returns; drop None.

    Raises:
        ModelRefused: An output is a number, a string or an input's size.
    """
    signature = program.graph_signature
    specs = [spec for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    tree = pytree.tree_unflatten(list(range(len(specs))), program.call_spec.out_spec)
    paths = {leaf: path for path, leaf in pytree.tree_flatten_with_path(tree)[0]}
    names = []
    for index, spec in enumerate(specs):
        name = _path_name(paths.get(index, ()))
        if type(spec.arg).__name__ == "TensorArgument":
            names.append(name)
        elif getattr(spec.arg, "value", 0) is not None:
            raise ModelRefused(
                f"{name} of forward is not a tensor: {getattr(spec.arg, 'value', 'a size')!r}",
                hint="return tensors alone",
            )
    if not names:
        raise ModelRefused("forward returns no tensor", hint="return a tensor, or a tuple or dict of tensors")
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]


def _path_name(path: tuple[Any, ...]) -> str:
    if not path:
        return "output"
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    if hasattr(path[0], "idx"):
        parts.insert(0, "output")
    return re.sub(r"\W+", "_", "_".join(parts))


def _name_interface(proto: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs the user's names; an output that is an input, a weight or another output gets a node."""
    graph = proto.graph
    fed = [value.name for value in graph.input]
    mapping = dict(zip(fed, inputs, strict=True))
    fixed = {*fed, *(tensor.name for tensor in graph.initializer)}
    copies: list[tuple[str, str, onnx.ValueInfoProto]] = []
    for value, name in zip(graph.output, outputs, strict=True):
        if value.name in fixed or value.name in mapping:
            copies.append((value.name, name, value))
        else:
            mapping[value.name] = name
    taken = {*inputs, *outputs}
    for name in sorted(values_in_use(graph) & taken):
        if name not in mapping:
            mapping[name] = _fresh(f"{name}_inner", values_in_use(graph) | taken)
    rename_values(graph, mapping)
    for source, name, value in copies:
        value.name = name
        node = graph.node.add(op_type="Identity", name=f"node_{name}")
        node.input.append(mapping.get(source, source))
        node.output.append(name)
        set_module_path(node, "")


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
