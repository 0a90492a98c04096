"""What the engine inspector says, read in the forms of TensorRT 10 and 11.

The texts are written after the documented fields and published excerpts of both versions; no plan is opened here.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cnncc.compiler.audit import audit, executed
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.cuda import inspector
from cnncc.targets.cuda.inspector import inspect, inspected, layers_of
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc_runtime.bundle import LayerRecord
from cnncc_runtime.gpu import HostGpu
from tests.calibration import patterns
from tests.calibration.rtx import tensorrt_rtx
from tests.targets.conformance import graph_of, small_graph

INT8_TACTIC = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_tilesize96x64x64_stage3"
HALF_TACTIC = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"


@pytest.fixture
def graph() -> OnnxGraph:
    """A convolution with a residual addition, and a product behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Add", ["c", "x"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "v"], ["y"], "fc"),
    ]
    return graph_of(nodes, {"x": None, "w": None, "v": None}, {"y": None})


def layer(name: str, kind: str, reads: list[str], nodes: str, *, split: bool = False, **more: Any) -> dict[str, Any]:
    """Return a layer as TensorRT 10 writes it; ``split`` as 11 does: the type in a field of its own."""

    def tensor(number: int, text: str) -> dict[str, Any]:
        shape = {"Name": f"t{number}", "Location": "Device", "Dimensions": [1, 32, 8, 8]}
        return shape | ({"Format": "Row major linear", "DataType": text} if split else {"Format/Datatype": text})

    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    inputs = [tensor(number, text) for number, text in enumerate(reads)]
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": [tensor(9, reads[0])], **more,
            "StreamId": 0, "Metadata": metadata}  # fmt: skip


def said(*layers: dict[str, Any] | str, version: int = 10) -> str:
    tail = {"Bindings": ["x", "y"]} if version == 10 else {"I/O Tensors": [{"Name": "x", "DataType": "Float"}]}
    return json.dumps({"Layers": list(layers), **tail})


def precisions(graph: OnnxGraph, *layers: dict[str, Any] | str, version: int = 10) -> dict[str, str]:
    return executed(inspected(graph, said(*layers, version=version), {}))


VECTORS = "Thirty-two wide channel vectorized row major Int8 format"


def test_records_say_who_computes_what_in_order(graph: OnnxGraph) -> None:
    text = said(
        layer("in", "Reformat", ["Row major linear FP32"], "", ParameterType="Reformat", Origin="REFORMAT"),
        layer("w + conv + add", "CaskConvolution", [VECTORS, VECTORS], "conv add relu", ParameterType="Convolution",
              Weights={"Type": "Int8", "Count": 9216}, TacticName=INT8_TACTIC),
        layer("fc_myl0_1", "gemm", ["Half"], "fc", TacticName=HALF_TACTIC),
        layer("__myl_Add_0", "kgen", ["Half", "Float"], "fc", TacticName="__myl_Add_0x1"),
    )  # fmt: skip
    assert inspected(graph, text, {}) == (
        LayerRecord("w + conv + add", ("conv", "add", "relu"), ("conv", "add", "relu"), ("Conv", "Add", "Relu"),
                    "int8", "CaskConvolution"),
        LayerRecord("fc_myl0_1", ("fc",), ("fc",), ("Gemm",), "float16", "gemm"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reads", "weights", "expected"),
    [
        (["Row major linear FP32"], "Float", "float32"),
        (["Row major linear FP32 format (kLINEAR)"], "Float", "float32"),
        (["Channel major FP16 format where channel % 8 == 0"], "Half", "float16"),
        (["Channel major BFloat16 format where channel % 8 == 0"], "BFloat16", "bfloat16"),
        ([VECTORS, "Row major linear FP32"], "Int8", "int8"),
        (["Channel major INT8 format where channel % 16 == 0."], "Int8", "int8"),
        (["Half(64,1:8,8,1)"], "Half", "float16"),
        (["Row major linear FP8 format"], "FP8", "float8_e4m3"),
        ([VECTORS], "Float", "int8×float32"),
        (["N/A due to dynamic shapes"], "Int8", "unknown"),
        (["Unknown format"], "Int8", "unknown"),
        ([VECTORS], "", "unknown"),
    ],
)
def test_a_convolution_multiplies_its_input_by_its_weights(
    graph: OnnxGraph, reads: list[str], weights: str, expected: str
) -> None:
    plain = layer("c", "CaskConvolution", reads, "conv", ParameterType="Convolution", Weights={"Type": weights})
    pooled = layer("c", "CaskConvActPool", reads, "conv", ParameterType="ConvActPool", ConvWeights={"Type": weights})
    assert precisions(graph, plain) == precisions(graph, pooled) == {"conv": expected}


@pytest.mark.parametrize("word", ["Int8", "INT8"])
def test_tensorrt_11_has_types_in_fields_of_their_own(graph: OnnxGraph, word: str) -> None:
    made = layer("c", "Convolution", [word], "conv", split=True, Weights={"Type": "Int8"})
    assert precisions(graph, made, version=11) == {"conv": "int8"}


def test_tensorrt_11_lists_weights_among_constants_the_largest_of_them(graph: OnnxGraph) -> None:
    constants = [{"Name": "scale", "Dimensions": [32], "Datatype": "Float"},
                 {"Name": "weights", "Dimensions": [32, 32], "Datatype": "Int8"}]  # fmt: skip
    made = layer("fc_myl0_1", "gemm", ["Int8"], "fc", split=True, Constants=constants)
    assert precisions(graph, made, version=11) == {"fc": "int8"}


def test_two_operands_that_are_no_weights_are_both_read(graph: OnnxGraph) -> None:
    made = layer("m", "MatrixMultiply", ["Row major linear FP16 format", "Row major linear FP32"], "fc")
    assert precisions(graph, made) == {"fc": "float16×float32"}


@pytest.mark.parametrize(
    ("tactic", "expected"),
    [
        (INT8_TACTIC, "int8"),
        (HALF_TACTIC, "float16"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_bf16_tn_n_tilesize64x64x64", "bfloat16"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckcrs_nhwc", "tfloat32"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_f32f32_f32f32_f32_nhwckcrs_nhwc", "float32"),
        ("__myl_0xabcdef", "unknown"),
    ],
)
def test_where_weights_are_hidden_the_kernels_name_says_what_it_multiplies(
    graph: OnnxGraph, tactic: str, expected: str
) -> None:
    assert precisions(graph, layer("g", "gemm", ["Float"], "fc", TacticName=tactic)) == {"fc": expected}


@pytest.mark.parametrize("kind", ["kgen", "Myelin", "ForeignNode", "PointWiseV2", "Reformat"])
def test_a_product_that_only_a_fused_layer_names_is_unknown(graph: OnnxGraph, kind: str) -> None:
    """Its tensors are int8, but whether it multiplies them so, nobody says."""
    assert precisions(graph, layer("__myl_MulSum", kind, ["Int8", "Int8"], "conv relu")) == {"conv": "unknown"}


def test_the_audit_counts_what_is_unknown_as_a_fallback() -> None:
    graph = patterns.CLEAN[0].graph()
    [conv] = [node for node in graph.nodes if node.op_type == "Conv"]
    hidden = layer("__myl_Conv", "kgen", ["Int8"], conv.name)
    shown = layer("c", "CaskConvolution", [VECTORS], conv.name, Weights={"Type": "Int8"})
    assert len(audit(graph, inspected(graph, said(hidden), {})).fallbacks) == 1
    assert audit(graph, inspected(graph, said(shown, hidden), {})).fallbacks == ()


def test_other_layers_compute_in_the_widest_type_that_they_read(graph: OnnxGraph) -> None:
    [found] = inspected(graph, said(layer("p", "kgen", ["Int8", "Half", "Float"], "add")), {})
    assert (found.precision, found.nodes) == ("float32", ("add",))


def test_without_metadata_a_layers_name_lists_its_nodes(graph: OnnxGraph) -> None:
    made = layer("w + QuantizeLinear_7 + conv + add", "CaskConvolution", [VECTORS], "", Weights={"Type": "Int8"})
    [found] = inspected(graph, said(made), {})
    assert found.nodes == ("conv", "add")


def test_renamed_nodes_get_their_labels_back(graph: OnnxGraph) -> None:
    [found] = inspected(graph, said(layer("c", "CaskConvolution", ["Half"], "Conv_0")), {"Conv_0": "conv"})
    assert found.nodes == ("conv",)


def test_separators_may_stand_in_the_text_unescaped(graph: OnnxGraph) -> None:
    text = said(layer("c", "Convolution", [VECTORS], "conv relu", Weights={"Type": "Int8"}))
    assert executed(inspected(graph, text.replace("\\u001e", "\x1f"), {})) == {"conv": "int8"}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"Layers": ["conv + relu", "fc"], "Bindings": []}', "{}"])
def test_where_nothing_is_said_nothing_is_claimed(graph: OnnxGraph, text: str) -> None:
    assert inspected(graph, text, {}) == ()


def test_without_the_gpu_the_real_library_opens_no_plan_and_the_listing_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt = tensorrt_rtx()
    monkeypatch.setattr(inspector, "host_gpus", lambda: ())
    assert layers_of(small_graph(), b"no plan", trt, "8.9", Chosen(VENDORS[0], "10.16.1.11"), {}) == ()
    assert inspect(trt, b"no plan") == ""


def test_what_no_listing_is_known_of_is_inspected_where_its_gpu_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspector, "host_gpus", lambda: (HostGpu("one", "9.0"),))
    monkeypatch.setattr(inspector, "inspect", lambda _trt, plan: plan.decode())
    weights = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    graph = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], {"x": [1, 4]}, {"y": [1, 4]}, [weights])
    plan = said(layer("m", "gemm", ["Half"], "m", TacticName=HALF_TACTIC)).encode()
    other, own = Chosen(VENDORS[1], "11.4.0.106"), Chosen(VENDORS[-1], "1.7.1.116")
    assert executed(layers_of(graph, plan, None, "9.0", other, {})) == {"m": "float16"}
    assert layers_of(graph, plan, None, "8.9", other, {}) == (), "another GPU"
    assert layers_of(graph, plan, None, "9.0", own, {}) == (), "its listing is known, and here is none"
