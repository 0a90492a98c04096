"""A graph and its table become the Q/DQ graph that calibration measured; other tables are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import helper

from cnncc.calibration.calibrate import Job, Options, calibrate
from cnncc.calibration.judge import Judge
from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.quantize import TABLE_KEY, prepare, quantize, write
from cnncc.calibration.table import CalibrationTable, floats_text, histogram_of
from cnncc.calibration.thresholds import METHODS, scale_of
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.errors import DataRefused, ModelRefused, UsageError
from tests.calibration.graphs import (
    Net,
    check,
    classifier,
    feeds_of,
    images,
    maker_of,
    node_of,
    run,
    scale_read,
    stream_of,
)

COUNT = 12


def uneven(*, shared: bool = False, relu6: bool = False) -> OnnxGraph:
    """Two branches of two convolutions, channels of very different ranges between them."""
    net = Net(1, 3, 8, 8, seed=2)
    spread = (4.0 ** np.arange(6)).astype(np.float32)
    bias = net.constant("shared.bias", net.random.uniform(0.5, 1.0, 6).astype(np.float32))
    branches = []
    for name in ("left", "right"):
        weight = net.weights(6, 3, 3, 3) * spread.reshape(-1, 1, 1, 1)
        own = bias if shared else net.constant(f"{name}.bias", net.constants[bias] * spread)
        x = net.node("Conv", ["x", net.constant(f"{name}.w", weight), own], f"{name}_1", 6, pads=[1] * 4)
        bounds = [net.constant(f"{name}.low", np.float32(0.0)), net.constant(f"{name}.high", np.float32(6.0))]
        x = net.node("Clip", [x, *bounds]) if relu6 else net.node("Relu", [x])
        back = net.weights(4, 6, 3, 3) / spread.reshape(1, -1, 1, 1)
        branches.append(net.node("Conv", [x, net.constant(f"{name}.back", back)], f"{name}_2", 4, pads=[1] * 4))
        spread = spread[::-1].copy()
    if not shared:
        del net.constants[bias]
    net.gemm(net.flat(net.node("Add", branches)), 5, "head")
    return net.graph()


def table_of(graph: OnnxGraph, **options: Any) -> CalibrationTable:
    return calibrate(Job(graph, "net", "0.0", stream_of(images(COUNT)), options=Options(**options)))


@pytest.fixture(scope="module")
def table() -> CalibrationTable:
    return table_of(uneven())


def judge(graph: OnnxGraph) -> Judge:
    """The judge of `table_of`: the first half of the samples."""
    return Judge(graph, feeds_of(images(COUNT)[: COUNT // 2]))


# ---- what is written


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("relu6", [False, True])
def test_the_graph_is_the_one_whose_noise_the_table_tells(shared: bool, relu6: bool) -> None:
    graph = uneven(shared=shared, relu6=relu6)
    found = table_of(graph)
    quantized = quantize(graph, found, name="net")
    check(quantized)
    assert found.sqnr_db is not None
    assert judge(graph).sqnr(quantized) == pytest.approx(found.sqnr_db, abs=0.01)
    kept = {step.step: step.kept for step in found.steps}
    assert kept["bias correction"]
    assert any(kept[name] for name in kept if name.startswith("equalization")) or relu6
    assert bool(found.equalization) == any(kept[name] for name in kept if "equalization" in name)
    assert any(layer.bias for layer in found.layers)


def test_a_bias_that_layers_share_is_equalized_and_corrected_for_each() -> None:
    graph = uneven(shared=True)
    found = table_of(graph)
    delta = np.arange(6, dtype=np.float32)
    layers = [msgspec.structs.replace(each, bias=floats_text(delta)) for each in found.layers if each.node[-2:] == "_1"]
    assert [layer.node for layer in layers] == ["left_1", "right_1"]
    kept = [layer for layer in found.layers if layer.node[-2:] != "_1"]
    changed = msgspec.structs.replace(found, layers=(*layers, *kept))
    prepared, quantized = prepare(graph, changed), quantize(graph, changed, name="net")
    biases = []
    for layer in layers:
        before = prepared.constant(node_of(prepared, layer.node).input[2])
        after = quantized.constant(node_of(quantized, layer.node).input[2])
        assert before is not None
        assert after is not None
        np.testing.assert_array_equal(after, before + delta)
        biases.append(before)
    assert not np.allclose(*biases)


def test_quantizing_is_a_pure_function(table: CalibrationTable) -> None:
    graph = uneven()
    before = graph.serialized
    assert quantize(graph, table, name="net").serialized == quantize(uneven(), table, name="net").serialized
    assert graph.serialized == before


def test_the_model_says_which_table_it_was_quantized_with(table: CalibrationTable) -> None:
    quantized = quantize(uneven(), table, name="net")
    assert {entry.key: entry.value for entry in quantized.proto.metadata_props} == {TABLE_KEY: table.digest}
    assert quantized.inputs == uneven().inputs
    assert quantized.outputs == uneven().outputs


def test_a_layer_in_float_keeps_its_weights_and_its_bias() -> None:
    graph = uneven()
    found = table_of(graph, keep=("net.left_1", "*head"), equalize=False)
    assert [layer.node for layer in found.kept] == ["left_1", "head"]
    quantized = quantize(graph, found, name="net")
    for name in ("left_1", "head"):
        assert list(node_of(quantized, name).input[1:]) == list(node_of(graph, name).input[1:])
    assert node_of(quantized, "left_1").input[0] == "x"
    assert node_of(quantized, "head").input[0] == node_of(graph, "head").input[0]


# ---- another method


@pytest.mark.parametrize("method", METHODS)
def test_another_method_s_thresholds_come_from_the_histograms(method: str, table: CalibrationTable) -> None:
    graph = uneven()
    quantized = quantize(graph, table, name="net", method=method)
    check(quantized)
    for group in table.groups:
        expected = scale_of(METHODS[method](histogram_of(group)))
        for tensor in group.tensors:
            [q] = [n for n in quantized.nodes if n.op_type == "QuantizeLinear" and n.input[0] == tensor]
            assert scale_read(quantized, _dequantized(quantized, q.output[0])) == expected


def _dequantized(graph: OnnxGraph, integers: str) -> str:
    [dq] = [n for n in graph.nodes if n.op_type == "DequantizeLinear" and n.input[0] == integers]
    return dq.output[0]


def test_another_method_leaves_biases_as_they_are(table: CalibrationTable) -> None:
    """A correction holds for the table's own scales."""
    graph = uneven()
    own, other = quantize(graph, table, name="net"), quantize(graph, table, name="net", method="max")
    corrected = [layer.node for layer in table.layers if layer.bias]
    assert corrected
    for name in corrected:
        assert node_of(own, name).input[2].endswith("_bias_corrected")
        assert list(node_of(other, name).input[2:]) == list(node_of(prepare(graph, table), name).input[2:])


@pytest.mark.parametrize("method", ["auto", "minmax", "imported"])
def test_an_unknown_method_is_refused(method: str, table: CalibrationTable) -> None:
    with pytest.raises(UsageError, match=f"'{method}' is no method") as caught:
        quantize(uneven(), table, name="net", method=method)
    assert "max, percentile, entropy, mse" in caught.value.hint


def test_imported_scales_have_no_other_method(table: CalibrationTable) -> None:
    bare = msgspec.structs.replace(table.groups[1], counts="", method="imported")
    imported = msgspec.structs.replace(table, groups=(table.groups[0], bare, *table.groups[2:]))
    quantize(uneven(), imported, name="net")
    with pytest.raises(UsageError, match="has no histograms"):
        quantize(uneven(), imported, name="net", method="mse")


# ---- tables of something else


def test_a_table_of_another_model_or_of_other_weights_is_refused(table: CalibrationTable) -> None:
    with pytest.raises(DataRefused, match="another model"):
        quantize(classifier(), table, name="mine")
    graph = uneven()
    weight = np.array(graph.constant("left.w"))
    proto = graph.copy_proto()
    [tensor] = [each for each in proto.graph.initializer if each.name == "left.w"]
    tensor.raw_data = (weight * np.float32(1.01)).tobytes()
    with pytest.raises(DataRefused, match="other weights"):
        quantize(OnnxGraph(proto), table, name="net")


def test_a_quantized_model_is_not_quantized_again(table: CalibrationTable) -> None:
    quantized = quantize(uneven(), table, name="net")
    with pytest.raises(DataRefused, match="another model"):
        quantize(quantized, table, name="net")
    with pytest.raises(ModelRefused, match="quantized already"):
        layers_of(quantized)


def test_a_tensor_without_a_scale_is_named(table: CalibrationTable) -> None:
    found = msgspec.structs.replace(table, groups=table.groups[1:])
    with pytest.raises(DataRefused, match="1 tensors have no scale: x"):
        quantize(uneven(), found, name="net")


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_correction_of_another_length_is_refused(size: int, table: CalibrationTable) -> None:
    wrong = msgspec.structs.replace(table.layers[0], bias=floats_text(np.ones(size, np.float32)))
    with pytest.raises(DataRefused, match="biases that the model does not have") as caught:
        quantize(uneven(), msgspec.structs.replace(table, layers=(wrong, *table.layers[1:])), name="net")
    assert caught.value.where == ("left_1",)


def test_a_correction_of_an_unknown_layer_is_refused(table: CalibrationTable) -> None:
    wrong = msgspec.structs.replace(table.layers[0], node="none", bias=floats_text(np.ones(6, np.float32)))
    with pytest.raises(DataRefused, match="biases that the model does not have"):
        quantize(uneven(), msgspec.structs.replace(table, layers=(wrong, *table.layers[1:])), name="net")


@pytest.mark.parametrize(
    "changes",
    [{"producers": ("none",)}, {"consumers": ()}, {"tensors": ("x",)}, {"scale": floats_text(np.float32([1]))}],
)
def test_an_equalization_of_channels_that_are_not_there_is_refused(
    changes: dict[str, Any], table: CalibrationTable
) -> None:
    wrong = msgspec.structs.replace(table.equalization[0], **changes)
    with pytest.raises(DataRefused):
        quantize(uneven(), msgspec.structs.replace(table, equalization=(wrong,)), name="net")


def test_preparing_computes_the_same_as_the_float_model(table: CalibrationTable) -> None:
    graph = uneven()
    prepared = prepare(graph, table)
    assert prepared.serialized != graph.serialized
    feeds = feeds_of(images(1))[0]
    np.testing.assert_allclose(run(prepared, feeds)["head"], run(graph, feeds)["head"], rtol=1e-4, atol=1e-5)


def test_without_a_digest_nothing_is_noted() -> None:
    graph = classifier()
    plan = plan_for(graph, layers_of(graph))
    scales = dict.fromkeys((tensor for group in plan.groups for tensor in group.tensors), 0.1)
    quantized = write(graph, plan.layers, scales)
    assert list(quantized.proto.metadata_props) == []
    weight = maker_of(quantized, node_of(quantized, "head").input[1])
    assert weight is not None
    assert weight.op_type == "DequantizeLinear"
    assert helper.get_attribute_value(weight.attribute[0]) == 0
