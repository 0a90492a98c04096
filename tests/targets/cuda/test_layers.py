"""The listing inside a plan, beside what another reader finds in it, and the audit of quantized models by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cnncc.calibration.lint import lint
from cnncc.calibration.plan import layers_of
from cnncc.compiler.audit import audit, executed
from cnncc.compiler.half import narrow
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import name_nodes, with_shapes
from cnncc.targets.base import BuildOptions
from cnncc.targets.cuda.layers import layer_records, read_listing
from cnncc.targets.cuda.target import CudaTarget
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.bundle import LayerRecord
from tests.calibration import patterns
from tests.calibration.qdq_builder import SCALE, QdqBuilder
from tests.calibration.rtx import LAYERS, VERSION, scan_plan, tensorrt_rtx
from tests.targets.conformance import graph_of, small_graph

RTX = VENDORS[-1]
LISTING = b"""\x00\x01noise
header {
  version = 5
  accelerators={sm89 }
descriptors {
  tensor={ alignment=128 dims={ 1 16 8 8 } name="x.1" offset=0 type=int8 }
  tensor={ alignment=128 dims={ 16 16 3 3 } name="w" offset=0 type=int8 }
  tensor={ alignment=128 dims={ 1 16 8 8 } name="c.1" offset=0 type=half }
  sub_tensor={ base="c.1" dims={ 1 16 8 8 } name="c.2" offset=0 type=half }
main {
 label bb1:
  corrltn={ name="conv" output={"c.1" } input={"x.1" "w" } stream=0 layers="[ONNX Layer: conv]\x1f[ONNX Layer: dq]" }
  function={ name=__myl_Add fqn=__myl_Add_0x1 input_args={ "c.2" } layers="[ONNX Layer: conv]\x1f[ONNX Layer: add]" }
  wait={ name="__mye1" stream=1 event=4 layers="" }
  runtime_fusion={ name=__myl_Fc input_args={ "y" } binary=0 layers="[ONNX Layer: fc]" backbone=gemm }
shape_main {
  function={ name=ignored layers="[ONNX Layer: conv]" }
header {
  version = 4
  accelerators={*}
descriptors {
  tensor={ alignment=4 dims={ 1 784 } name="x.1" offset=0 type=float }
  tensor={ alignment=4 dims={ 784 10 } name="w" offset=0 type=half }
main {
  fully_connected={ name="fc" output={"z" } input={"x.1" "w" } layers="[ONNX Layer: fc]" }
"""


def test_a_listing_is_read_section_by_section() -> None:
    kernels = read_listing(LISTING)
    assert [(kernel.kind, kernel.name, kernel.operands, kernel.nodes, kernel.nested) for kernel in kernels] == [
        ("corrltn", "conv", ("int8", "int8"), ("conv", "dq"), False),
        ("function", "__myl_Add", ("half",), ("conv", "add"), False),
        ("wait", "__mye1", (), (), False),
        ("runtime_fusion", "__myl_Fc", ("",), ("fc",), False),
        ("fully_connected", "fc", ("float", "half"), ("fc",), True),
    ]


def _records(version: str) -> tuple[LayerRecord, ...]:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Add", ["c", "c"], ["y"], "add"),
        helper.make_node("Gemm", ["y", "v"], ["z"], "fc"),
    ]
    graph = graph_of(nodes, {"x": None, "w": None, "v": None}, {"z": None})
    return layer_records(graph, LISTING, Chosen(RTX, version), {})


def test_scales_behind_a_product_are_not_the_product() -> None:
    conv, add, fc = _records(VERSION)
    assert (conv.nodes, conv.precision, conv.schedule) == (("conv",), "int8", "corrltn")
    assert (add.nodes, add.precision) == (("add",), "float16")
    assert (fc.nodes, fc.kernel, fc.precision) == (("fc",), "__myl_Fc", "float32×float16")
    assert executed((conv, add, fc)) == {"conv": "int8", "fc": "float32×float16"}


def test_of_another_version_nothing_is_said() -> None:
    assert _records("1.8.0.1") == ()


def test_a_plan_without_a_listing_has_no_kernels() -> None:
    assert read_listing(b"ftrt" + bytes(range(256)) * 9) == ()


BUILT = [pattern for pattern in patterns.PATTERNS if pattern.rtx not in ("refused", "crash")]


@pytest.mark.parametrize("pattern", BUILT, ids=lambda pattern: pattern.name)
def test_executed_types_are_those_of_the_plan_and_the_audit_finds_float_layers(
    pattern: patterns.Pattern, tmp_path: Path
) -> None:
    tensorrt_rtx()
    proto = pattern.graph().copy_proto()
    name_nodes(proto.graph)
    graph = with_shapes(OnnxGraph(proto))
    profile = resolve_profile("sm89")
    batches = (4, 1) if any(spec.symbols for spec in graph.inputs) else ()
    engine = CudaTarget(profile).build(graph, BuildOptions(profile, batches), tmp_path)
    found = executed(engine.layers)
    products = {node.name for node in graph.nodes if node.op_type in LAYERS}
    assert set(found) == products, "every product is named"
    names = {"int8": "int8", "float": "float32", "half": "float16", "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3"}
    scanned = {node: kind for node, kind in scan_plan(engine.payload.read_bytes()).items() if node in products}
    expected = {node: "×".join(names[one] for one in kind.split("×")) for node, kind in scanned.items()}
    assert found == expected
    if pattern.rtx == "int8":
        assert audit(graph, engine.layers).fallbacks == ()


@pytest.mark.parametrize(("channels", "kind"), [(1, "float32"), (4, "float32"), (5, "int8")])
def test_one_pixel_of_few_products_is_float_and_the_lint_knows(channels: int, kind: str, tmp_path: Path) -> None:
    tensorrt_rtx()
    b, none = QdqBuilder(), [0, 0, 0, 0]
    pixel = b.qdq(b.op("GlobalAveragePool", b.input("x", 1, 16, 8, 8)), SCALE)
    squeezed = b.op("Relu", b.conv(pixel, b.weight(channels, 16, 1, 1), channels, "squeeze", pads=none))
    graph = with_shapes(b.graph(b.conv(b.qdq(squeezed), b.weight(16, channels, 1, 1), 16, "excite", pads=none)))
    profile = resolve_profile("sm89")
    engine = CudaTarget(profile).build(graph, BuildOptions(profile), tmp_path)
    assert executed(engine.layers) == {"squeeze": "int8", "excite": kind}
    found = [finding.rule for finding in lint(graph) if finding.severity == "float"]
    assert found == (["one-pixel"] if kind == "float32" else [])


@pytest.mark.parametrize(
    ("channels", "batch", "layers"),
    [(4, 1, ["squeeze"]), (5, 1, ["squeeze", "excite"]), (4, 2, ["squeeze", "excite"])],
)
def test_such_a_layer_is_not_quantized(channels: int, batch: int, layers: list[str]) -> None:
    b, none = QdqBuilder(), [0, 0, 0, 0]
    pixel = b.op("GlobalAveragePool", b.input("x", batch, 16, 8, 8))
    squeezed = b.op("Relu", b.conv(pixel, b.floats(channels, 16, 1, 1), channels, "squeeze", pads=none))
    gate = b.conv(squeezed, b.floats(16, channels, 1, 1), 16, "excite", pads=none)
    graph = b.graph(b.op("Sigmoid", gate))
    assert [layer.node for layer in layers_of(graph)] == layers


def test_the_audit_names_layers_that_old_gpus_compute_in_float(tmp_path: Path) -> None:
    """On Turing, TensorRT-RTX builds Q/DQ convolutions in float and says nothing of it."""
    tensorrt_rtx()
    pattern = patterns.CLEAN[0]
    profile = resolve_profile("sm75")
    graph = pattern.graph()
    engine = CudaTarget(profile).build(graph, BuildOptions(profile), tmp_path)
    found = audit(graph, engine.layers)
    assert found.asked
    assert len(found.fallbacks) == found.asked


def test_a_float_model_has_no_int8_layers(tmp_path: Path) -> None:
    tensorrt_rtx()
    profile = resolve_profile("sm120")
    engine = CudaTarget(profile).build(small_graph(), BuildOptions(profile), tmp_path)
    assert executed(engine.layers) == {"conv1": "float32", "conv2": "float32", "classifier": "float32"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_layers_in_float32_that_are_computed_in_half_precision_are_named(precision: str, tmp_path: Path) -> None:
    """TensorRT-RTX takes casts right before and behind a convolution into it."""
    tensorrt_rtx()
    profile = resolve_profile("sm89")
    rng = np.random.default_rng(0)
    names = ("first", "second", "third")
    weights = [numpy_helper.from_array(rng.standard_normal((16, 16, 3, 3)).astype("f") / 12, f"{n}.w") for n in names]
    nodes = []
    for source, name in zip(("x", "first.relu", "second.relu"), names, strict=True):
        nodes.append(helper.make_node("Conv", [source, f"{name}.w"], [f"{name}.out"], name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"], f"{name}.relu"))
    graph = with_shapes(graph_of(nodes, {"x": [1, 16, 8, 8]}, {"third.relu": [1, 16, 8, 8]}, weights))
    for prone, named in ((["second"], ("second (second)",)), (["second", "second.relu"], ())):
        made = narrow(graph, precision, prone).graph
        engine = CudaTarget(profile).build(made, BuildOptions(profile), tmp_path)
        found = audit(made, engine.layers, precision)
        assert (found.asked, found.fallbacks, found.narrowed) == (2, (), named)


def row_products(precision: str) -> tuple[OnnxGraph, OnnxGraph]:
    """Return a network that ends in products of one row behind a MaxPool: narrow, and with the second product wide."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (1024, 32), "w3": (32, 10)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype("f") / 8, name) for name, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("MaxPool", ["c"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["g"], "first"),
        helper.make_node("Relu", ["g"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w3"], ["y"], "second"),
    ]
    graph = with_shapes(graph_of(nodes, {"x": [1, 3, 16, 16]}, {"y": [1, 10]}, weights))
    return narrow(graph, precision).graph, narrow(graph, precision, ["second"]).graph


@pytest.mark.parametrize("sm", ["sm80", "sm120"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_of_one_row_are_in_the_type_of_their_weights(precision: str, sm: str, tmp_path: Path) -> None:
    """TensorRT-RTX pools bfloat16 in float32, and the product behind it reads that."""
    tensorrt_rtx()
    profile = resolve_profile(sm)
    graph, mixed = row_products(precision)
    engine = CudaTarget(profile).build(graph, BuildOptions(profile), tmp_path)
    found = audit(graph, engine.layers, precision)
    assert (found.asked, found.fallbacks) == (3, ())
    wider = CudaTarget(profile).build(mixed, BuildOptions(profile), tmp_path)
    assert audit(mixed, wider.layers, precision).asked == 2, "what is wide in the graph is no fallback"
    assert audit(graph, wider.layers, precision).fallbacks == ("second (second)",)
