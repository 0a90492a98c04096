"""What a plan executes, by the listing inside it.

Without a GPU no plan is deserialized, so there is no engine inspector. But a plan of TensorRT-RTX that was built with
detailed verbosity holds its program as text: sections of tensors with their types, then kernels with their operands and
the ONNX nodes that they came from::

    header {
      version = 5
      accelerators={sm89 }
    descriptors {
      tensor={ dims={ 1 16 8 8 } name="x.1" type=int8 }
    main {
      corrltn={ name="conv1" output={"y.1" } input={"x.1" "w" } layers="[ONNX Layer: conv1][ONNX Layer: relu1]" }

The listing is not documented, so it is read in the versions that it was read in by a human, and of no other is anything
said. A program inside a kernel (``runtime_fusion``) has a section of its own, for any accelerator, with the same nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cnncc.graph.names import module_path, node_label
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.cuda.vendors import Chosen
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.plan_library import RTX

KNOWN = {RTX: frozenset({"1.7.1.116"})}
"""Backend → versions whose listing is read."""

_LINE = re.compile(rb"[\t\x1f -\x7e]{4,}")
_TENSOR = re.compile(r'(?:sub_)?tensor=\{.*? name="([^"]+)".*? type=(\w+) \}')
_CONSTANT = re.compile(r" const_payload_size=(\d+)")
_KERNEL = re.compile(r'  (\w+)=\{ (?:name|fqn)="?([^" ]+)"?')
_INPUTS = re.compile(r" input(?:_args)?=\{([^}]*)\}")
_LAYERS = re.compile(r' layers="([^"]*)"')
_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1f]*)\]")
_NAME = re.compile(r'"([^"]+)"')

_PRODUCTS = frozenset({"corrltn", "deconvolution", "fully_connected"})
"""Kernels that multiply their first two operands: convolutions, transposed ones, products of matrices."""

MULTIPLIES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
"""ONNX operators that multiply two operands."""

_SHORT = {"float": "float32", "half": "float16", "bf16": "bfloat16", "double": "float64", "fp8_e4m3": "float8_e4m3"}
_WIDTH = ("double", "float", "bf16", "half")
"""Floating types, the widest first."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a listing.

    Attributes:
        kind: As the listing calls it: ``corrltn``, ``function``, ``maxpool``, …
        name: Its name.
        operands: Types of what it reads, in order.
        nodes: Names of the ONNX nodes that it came from.
        nested: Whether it is part of another kernel.
        largest: Type of the largest constant that it reads; empty where it reads none.
    """

    kind: str
    name: str
    operands: tuple[str, ...]
    nodes: tuple[str, ...]
    nested: bool
    largest: str = ""


@dataclass
class _Section:
    nested: bool = False
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    inside: str = ""


def read_listing(plan: bytes) -> tuple[Kernel, ...]:
    """Return the kernels that a plan lists, in order; those inside others come after all."""
    section = _Section()
    found: list[Kernel] = []
    for raw in _LINE.findall(plan):
        line = raw.decode("ascii")
        head = line.strip()
        if head == "header {":
            section = _Section(inside="header")
        elif head in ("descriptors {", "main {", "shape_main {"):
            section.inside = head.split()[0]
        elif section.inside == "header" and head.startswith("accelerators={*"):
            section.nested = True
        elif section.inside == "descriptors" and (tensor := _TENSOR.search(line)):
            section.types[tensor[1]] = tensor[2]
            if constant := _CONSTANT.search(line):
                section.constants[tensor[1]] = int(constant[1])
        elif section.inside == "main" and (kernel := _KERNEL.match(line)):
            found.append(_kernel(kernel[1], kernel[2], line, section))
    return tuple(sorted(found, key=lambda kernel: kernel.nested))


def _kernel(kind: str, name: str, line: str, section: _Section) -> Kernel:
    inputs, layers = _INPUTS.search(line), _LAYERS.search(line)
    read = _NAME.findall(inputs[1]) if inputs else []
    operands = tuple(section.types.get(each, "") for each in read)
    largest = max((each for each in read if each in section.constants), key=section.constants.__getitem__, default="")
    nodes = tuple(dict.fromkeys(_NODE.findall(layers[1]))) if layers else ()
    return Kernel(kind, name, operands, nodes, section.nested, section.types.get(largest, ""))


def layer_records(graph: OnnxGraph, plan: bytes, chosen: Chosen, names: Mapping[str, str]) -> tuple[LayerRecord, ...]:
    """Return one record per kernel that computes nodes of the graph, in order of execution.

    Args:
        graph: What the plan was built from.
        plan: The plan.
        chosen: The library that built it.
        names: Names of nodes in the plan → labels in the graph, where they differ.

    Returns:
        Nothing where this library's listing is not one that is known.
    """
    if chosen.version not in KNOWN.get(chosen.vendor.backend, ()):
        return ()
    kernels = read_listing(plan)
    nodes = {node_label(node): node for node in graph.nodes}
    labels = {kernel: tuple(label for name in kernel.nodes if (label := names.get(name, name)) in nodes)
              for kernel in kernels}  # fmt: skip
    products = {label for label, node in nodes.items() if node.op_type in MULTIPLIES}
    multiplied = _multiplied(kernels, labels, products)
    records = []
    for kernel in kernels:
        own = labels[kernel]
        if kernel.kind not in _PRODUCTS and kernel.kind != "runtime_fusion":
            own = tuple(label for label in own if label not in multiplied)  # scales and biases behind the product
        if kernel.nested or not own:
            continue
        inner = next((multiplied[label] for label in own if label in multiplied), "")
        records.append(
            LayerRecord(
                kernel=kernel.name,
                modules=tuple(dict.fromkeys(module_path(nodes[label]) for label in own)),
                nodes=own,
                ops=tuple(nodes[label].op_type for label in own),
                precision=inner or (_weighed(kernel) if products.intersection(own) else _computed(kernel.operands)),
                schedule=kernel.kind,
            )
        )
    return tuple(records)


def _multiplied(
    kernels: Iterable[Kernel], labels: Mapping[Kernel, tuple[str, ...]], products: set[str]
) -> dict[str, str]:
    """Return node → type that its product kernel multiplies; both types where its two operands differ."""
    found: dict[str, str] = {}
    for kernel in kernels:
        if kernel.kind not in _PRODUCTS:
            continue
        types = tuple(dict.fromkeys(map(_type, kernel.operands[:2])))
        for label in products.intersection(labels[kernel]):
            known = found.get(label, "").split("×") if label in found else []
            found[label] = "×".join(dict.fromkeys((*known, *types)))  # in several kernels: all that they multiply
    return found


def _computed(operands: tuple[str, ...]) -> str:
    """Return the type that a kernel of any other kind computes in: the widest floating type that it reads."""
    wide = next((kind for kind in _WIDTH if kind in operands), None)
    return _type(wide or next(iter(operands), ""))


def _weighed(kernel: Kernel) -> str:
    """Return the type that a product in a kernel of any other kind computes in: its weights', among floats.

    Such kernels are written for a product of one row, and cast what they read: a MaxPool of bfloat16 before it gives
    float32.
    """
    floats = set(kernel.operands) <= set(_WIDTH)
    return _type(kernel.largest) if floats and kernel.largest else _computed(kernel.operands)


def _type(name: str) -> str:
    return _SHORT.get(name, name) or "unknown"
