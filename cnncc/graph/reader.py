"""Reads ONNX files that may be damaged or hostile, and raises old ones to a supported operator set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import checker, numpy_helper, version_converter

from cnncc.graph.names import node_metadata, place
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.shapes import byte_count, infer, reason, skeleton_of, with_values
from cnncc.graph.values import STANDARD_DOMAINS, all_graphs, all_nodes, inlined, reads
from cnncc_runtime.errors import ModelRefused, UnsupportedGraph, WeightsRefused
from cnncc_runtime.specs import TensorSpec

OLDEST_OPSET = 13
"""Opsets below are converted: from 13 on, shapes and axes are inputs, which is what passes and targets know."""

RAISED_OPSET = 18
"""What old models are converted to: the same as exported ones (cnncc.compiler.export.OPSET)."""

_GROUPS_OPSET = 21
"""From which on GroupNormalization scales channels, not groups."""

_RAISED_IR = 10
_NEWEST_IR = int(onnx.IR_VERSION)
_LIMIT = 2**31 - 1
"""Protobuf's own bound on one message."""

_SHOWN = 10
_BOUNDS = ("Where", "Clip", "Min", "Max", "Pad", "Add", "Concat", "Less", "Greater", "Equal", "Expand", "IsInf")
"""Operators whose constants may be infinite on purpose: bounds and masks."""


def read_onnx(path: Path) -> OnnxGraph:
    """Read a model: parsed, bounded, checked, shapes inferred, functions expanded, weights inside.

    Args:
        path: The file; external data must lie in its folder.

    Returns:
        A graph of standard operators, opset 13 or newer, with unique node names.

    Raises:
        ModelRefused: Missing, damaged, too large, or not valid ONNX.
        UnsupportedGraph: Holds operators outside ONNX; lists every one.
        WeightsRefused: Weights hold NaN or Inf; names them.
    """
    proto = _parse(path)
    _load_external(proto, path)
    _check_tensors(proto)
    _check_versions(proto, path)
    _check_domains(proto)
    proto = inlined(proto)
    _check(proto, path)
    _check_weights(proto)
    name_nodes(proto.graph)
    return _shaped(_raised(proto))


def load_trusted(path: Path, digest: str = "") -> OnnxGraph:
    """Load a graph that cnncc itself wrote: parsed, not checked again.

    Args:
        path: The file.
        digest: Of the graph, where it is known: finding it takes longer than loading.

    Raises:
        ModelRefused: Missing or damaged.
    """
    return OnnxGraph(_parse(path), digest)


def bind_shapes(graph: OnnxGraph, specs: Iterable[TensorSpec]) -> OnnxGraph:
    """Return the graph with its inputs' shapes set, and all others inferred anew.

    Args:
        graph: Inputs may have symbolic dimensions; equal symbols get equal sizes.
        specs: By name; an input that is not named keeps its shape.

    Raises:
        ModelRefused: The rank or a fixed size differs, one symbol would get two sizes, or shapes then contradict.
    """
    wanted = {spec.name: spec for spec in specs}
    sizes: dict[str, int | str] = {}
    for own in graph.inputs:
        if own.name in wanted:
            _match(own, wanted[own.name], sizes)
    proto = graph.copy_proto()
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, wanted[value.name].shape if value.name in wanted else (), strict=False):
            _set(dim, size)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                _set(dim, sizes[dim.dim_param])
            elif dim.dim_param and sizes and value.name not in wanted:
                dim.Clear()  # an expression of a symbol that has changed: inference finds it again
    return _shaped(proto)


def bind_batch(graph: OnnxGraph, batch: int) -> OnnxGraph:
    """Return the graph for one batch size: the symbolic first dimensions set.

    Raises:
        ModelRefused: Shapes contradict each other at that size.
    """
    bound = [spec.bind({s: batch for s in spec.symbols if spec.shape[0] == s}) for spec in graph.inputs]
    return bind_shapes(graph, bound)


def with_shapes(graph: OnnxGraph) -> OnnxGraph:
    """Return the graph with every value's type and shape inferred.

    Raises:
        ModelRefused: Types or shapes contradict each other.
    """
    return _shaped(graph.copy_proto())


def raised(graph: OnnxGraph, opset: int) -> OnnxGraph:
    """Return the graph with this operator set at least, every value's type and shape inferred.

    Raises:
        ModelRefused: onnx's version converter does not know one of its operators, or would change its meaning.
    """
    if graph.opset >= opset:
        return graph
    if graph.opset < _GROUPS_OPSET <= opset and (
        found := [n for n in graph.nodes if n.op_type == "GroupNormalization"]
    ):
        raise ModelRefused(
            f"the model's opset {graph.opset} cannot be raised to {opset}: GroupNormalization has a scale for each "
            f"channel from {_GROUPS_OPSET} on, and onnx's converter leaves one for each group",
            where=[place(node) for node in found],
            hint=f"export the model again with opset {opset}",
        )
    return _shaped(_converted(_plain(graph.copy_proto()), opset))


def _shaped(proto: onnx.ModelProto) -> OnnxGraph:
    """Return the graph of a protobuf that nothing else holds: changed in place, since a copy copies all weights."""
    values, outputs = infer(skeleton_of(proto))
    with_values(proto, values, outputs)
    return OnnxGraph(proto)


def external_files(path: Path) -> tuple[Path, ...]:
    """List the files that hold a model's external data.

    Raises:
        ModelRefused: The model cannot be parsed, or names a file outside its folder.
    """
    tensors = list(_external_tensors(_parse(path)))
    return tuple(sorted({_external_path(tensor, path.parent) for tensor in tensors}))


# ---- parsing


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.is_dir():
            raise ModelRefused(f"{path} is a folder, not an ONNX file")
        size = path.stat().st_size
        if size == 0:
            raise ModelRefused(f"{path} is empty")
        if size > _LIMIT:
            raise ModelRefused(
                f"{path} is {size / 2**30:.1f} GiB, more than one ONNX file can hold (2 GiB)",
                hint="store large weights as external data",
            )
        data = path.read_bytes()
    except OSError as exc:
        raise ModelRefused(f"{path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, RuntimeError, ValueError, MemoryError) as exc:
        raise ModelRefused(
            f"{path} is truncated, damaged or not an ONNX file", hint="copy or export the file again"
        ) from exc
    if not proto.HasField("graph") or not proto.ir_version or not proto.graph.node:
        raise ModelRefused(f"{path} holds no ONNX graph", hint="copy or export the file again")
    return proto


# ---- external data


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor: initializers and attributes, nested graphs and functions included."""
    for graph in all_graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    bodies = [node for function in proto.functions for node in function.node]
    for node in (*all_nodes(proto.graph), *bodies):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (t for t in _tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL)


def _external_path(tensor: onnx.TensorProto, folder: Path) -> Path:
    """Return the file that holds a tensor's data.

    Raises:
        ModelRefused: Outside the model's folder by any route, missing, or not a regular file.
    """
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    pure = PurePosixPath(location.replace("\\", "/"))
    if not location or pure.is_absolute() or ".." in pure.parts or "\0" in location or ":" in location:
        raise ModelRefused(
            f"the data of '{tensor.name}' is said to be at '{location}', outside the model's folder",
            hint="external data must lie beside the model, under a relative path",
        )
    root = folder.resolve()
    path = (root / location).resolve()
    if not path.is_relative_to(root):
        raise ModelRefused(f"the data of '{tensor.name}' leaves the model's folder by a link: '{location}'")
    if not path.is_file():
        raise ModelRefused(f"the data of '{tensor.name}' is missing: {path}", hint="copy the data file with the model")
    return path


def _load_external(proto: onnx.ModelProto, model: Path) -> None:
    total = model.stat().st_size
    for tensor in _external_tensors(proto):
        file = _external_path(tensor, model.parent)
        fields = {entry.key: entry.value for entry in tensor.external_data}
        size, want = file.stat().st_size, byte_count(tensor)
        offset = _natural(fields.get("offset", "0"), tensor)
        length = _natural(fields.get("length", str(want)), tensor)
        if length != want or offset + length > size:
            raise ModelRefused(
                f"the data of '{tensor.name}' does not fit {file.name}: {length} bytes at {offset}, "
                f"the tensor needs {want}, the file has {size}"
            )
        total += length
        if total > _LIMIT:
            raise ModelRefused("the model's weights exceed 2 GiB, more than cnncc holds in one graph")
        with file.open("rb") as handle:
            handle.seek(offset)
            tensor.raw_data = handle.read(length)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def _natural(text: str, tensor: onnx.TensorProto) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ModelRefused(f"the data of '{tensor.name}' is at '{text}', not a number")
    return int(text)


# ---- checks


def _check_tensors(proto: onnx.ModelProto) -> None:
    """Refuse tensors whose data does not fit their shape: readers trust it and read past the end."""
    for tensor in _tensors(proto):
        if tensor.data_type == onnx.TensorProto.STRING:
            raise ModelRefused(f"'{tensor.name}' holds strings", hint="cnncc compiles numeric graphs")
        want = byte_count(tensor)
        if tensor.HasField("raw_data"):
            if len(tensor.raw_data) != want:
                raise ModelRefused(f"'{tensor.name}' has {len(tensor.raw_data)} bytes, its shape needs {want}")
            continue
        try:
            numpy_helper.to_array(tensor)
        except Exception as exc:  # NumPy and onnx raise many types on bad data
            raise ModelRefused(f"'{tensor.name}' has data that does not fit its shape: {reason(exc)}") from exc


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    if proto.ir_version > _NEWEST_IR:
        raise ModelRefused(
            f"{path} has IR version {proto.ir_version}, newer than this onnx reads ({_NEWEST_IR})",
            hint="update the onnx package, or export for an older version",
        )
    versions = [o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not 1 <= versions[0] <= newest:
        raise ModelRefused(f"{path} asks for opset {versions or 'none'}; this onnx knows 1 to {newest}")


def _check_domains(proto: onnx.ModelProto) -> None:
    own = {(function.domain, function.name) for function in proto.functions}
    bodies = [node for function in proto.functions for node in function.node]
    foreign = [
        node
        for node in (*all_nodes(proto.graph), *bodies)
        if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in own
    ]
    if foreign:
        raise UnsupportedGraph(
            f"the model uses {len(foreign)} operators that are not ONNX's own",
            where=[f"{place(node)}: {node.domain}::{node.op_type}" for node in foreign],
            hint="export without custom operators (no fused or vendor operators)",
        )


def _check(proto: onnx.ModelProto, path: Path) -> None:
    if proto.graph.sparse_initializer:
        raise ModelRefused("the model holds sparse weights", hint="store them dense")
    try:
        checker.check_model(_plain(skeleton_of(proto)))
    except Exception as exc:  # onnx's C++ raises ValidationError, RuntimeError, ValueError
        raise ModelRefused(f"{path} is not valid ONNX: {reason(exc)}", hint="copy or export the file again") from exc
    outputs = {name for node in proto.graph.node for name in node.output}
    outputs |= {value.name for value in (*proto.graph.input, *proto.graph.initializer)}
    if unknown := [value.name for value in proto.graph.output if value.name not in outputs]:
        raise ModelRefused(f"{path} is not valid ONNX: nothing computes the outputs {', '.join(unknown)}")


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the skeleton as the checker wants it: functions are expanded, so their opsets go."""
    kept = [o for o in proto.opset_import if o.domain in STANDARD_DOMAINS]
    copies = [onnx.helper.make_opsetid(o.domain, o.version) for o in kept]
    del proto.opset_import[:]
    proto.opset_import.extend(copies)
    return proto


def _check_weights(proto: onnx.ModelProto) -> None:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    bad = []
    for tensor in proto.graph.initializer:
        users = readers.get(tensor.name, [])
        if found := _nonfinite(tensor, all(user.op_type in _BOUNDS for user in users)):
            at = f" of {place(users[0])}" if users else ""
            bad.append(f"'{tensor.name}'{at}: {found}")
    if bad:
        more = [f"… and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        raise WeightsRefused(
            f"{len(bad)} weight tensors hold NaN or Inf",
            where=bad[:_SHOWN] + more,
            hint="the training diverged, or the file is damaged: take an earlier checkpoint",
        )


def _nonfinite(tensor: onnx.TensorProto, bound: bool) -> str:
    if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
        return ""
    array = numpy_helper.to_array(tensor)
    if np.isfinite(array).all():
        return ""
    nans, infs = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    return "" if bound and not nans else f"{nans} NaN, {infs} Inf of {array.size}"


# ---- names and versions


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name, in place: its own, or one made of its operator and place in the graph."""
    taken = {node.name for node in all_nodes(graph)}
    seen: set[str] = set()
    for index, node in enumerate(all_nodes(graph)):
        name = node.name or f"{node.op_type}_{index}"
        if name in seen or (not node.name and name in taken):
            count = 1
            while f"{name}_{count}" in taken or f"{name}_{count}" in seen:
                count += 1
            name = f"{name}_{count}"
        node.name = name
        seen.add(name)


def _raised(proto: onnx.ModelProto) -> onnx.ModelProto:
    version = next(o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS)
    return _plain(proto) if version >= OLDEST_OPSET else _converted(_plain(proto), RAISED_OPSET)


def _converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    metadata = {node.name: [(e.key, e.value) for e in node.metadata_props] for node in proto.graph.node}
    proto.ir_version = max(proto.ir_version, 4)
    try:
        made = version_converter.convert_version(proto, opset)
    except Exception as exc:  # onnx's C++ raises ConvertError and RuntimeError
        raise ModelRefused(
            f"the model's opset {proto.opset_import[0].version} cannot be raised to {opset}: {reason(exc)}",
            hint="export the model again with a newer opset",
        ) from exc
    made.ir_version = _RAISED_IR
    for node in made.graph.node:  # the converter's own representation has no metadata
        for key, value in metadata.get(node.name, ()):
            if node_metadata(node, key) is None:
                node.metadata_props.add(key=key, value=value)
    name_nodes(made.graph)
    _keep_interface(proto, made)
    return made


def _keep_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for what, old, new in (
        ("inputs", before.graph.input, after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        if [value.name for value in old] != [value.name for value in new]:
            raise ModelRefused(f"raising the model's opset changed its {what}", hint="export it with a newer opset")


def _match(own: TensorSpec, want: TensorSpec, sizes: dict[str, int | str]) -> None:
    if len(own.shape) != len(want.shape) or own.dtype != want.dtype:
        raise ModelRefused(f"input '{own.name}' is {own}, {want} was asked")
    for have, size in zip(own.shape, want.shape, strict=True):
        if isinstance(have, int):
            if have != size:
                raise ModelRefused(
                    f"input '{own.name}' has a fixed size {have} where {size} was asked",
                    where=[str(own), f"asked: {want}"],
                    hint="export the model again with that dimension left open (dynamic)",
                )
        elif have != "?" and sizes.setdefault(have, size) != size:
            raise ModelRefused(
                f"'{have}' of input '{own.name}' would be both {sizes[have]} and {size}", where=[str(want)]
            )


def _set(dim: onnx.TensorShapeProto.Dimension, size: int | str) -> None:
    dim.Clear()
    if isinstance(size, int):
        dim.dim_value = size
    elif size != "?":
        dim.dim_param = size
