"""ONNX files, whole, damaged and hostile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_batch, bind_shapes, external_files, load_trusted, read_onnx
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import CnnccError, ModelRefused, UnsupportedGraph, WeightsRefused
from cnncc_runtime.specs import TensorSpec
from tests.graph.graphs import graph_of

LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))
SMALL = [path for path in LIGHT if "vgg" not in path.name and "zfnet" not in path.name and "alexnet" not in path.name]


def model(**changes: Any) -> onnx.ModelProto:
    weight = np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    return graph_of(nodes, {"x": ("N", 4, 5, 5)}, {"w": weight, **changes}).copy_proto()


def saved(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path: Path, what: str, kind: type[CnnccError] = ModelRefused) -> CnnccError:
    with pytest.raises(kind, match=what) as caught:
        read_onnx(path)
    return caught.value


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_old_models_are_raised_and_compute_the_same(path: Path) -> None:
    graph = read_onnx(path)
    assert graph.opset == 18
    names = [node.name for node in graph.nodes]
    assert len({*names}) == len(names) and all(names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    feeds = random_feeds(graph.inputs, 0)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for old, new in zip(session.run(None, feeds), Reference(graph).run(feeds).values(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_metadata_survives_raising(tmp_path: Path) -> None:
    nodes = [helper.make_node("Dropout", ["x"], ["y"], name="drop", ratio=0.3)]
    proto = graph_of(nodes, {"x": (2, 3)}, {}, opset=9).copy_proto()
    proto.graph.node[0].metadata_props.add(key="cnncc.module", value="head.drop")
    graph = read_onnx(saved(tmp_path, proto))
    assert ("drop", "head.drop") in [(node.name, path) for node, path in graph.places()]


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "empty"), (b"hello, this is text", "ONNX"), (b"PK\x03\x04" + bytes(100), "ONNX"), (bytes(64), "ONNX")],
)
def test_files_that_are_not_onnx_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, what)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "cannot be read")
    refused(tmp_path, "folder")


def test_a_file_over_two_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    refused(path, "2 GiB")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, keep: float) -> None:
    data = saved(tmp_path, model()).read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "truncated|holds no|valid ONNX|bytes, its shape|opset|contradict")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bits_are_refused_or_read_but_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped.onnx"
    path.write_bytes(bytes(content))
    try:
        graph = read_onnx(path)
    except CnnccError as exc:
        assert exc.exit_code == 4
    else:
        assert isinstance(graph, OnnxGraph)


def test_a_graph_without_a_producer_for_its_output_is_refused(tmp_path: Path) -> None:
    proto = model()
    proto.graph.output[0].name = "nowhere"
    refused(saved(tmp_path, proto), "valid ONNX|contradict")


def test_shapes_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    proto = model()
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    refused(saved(tmp_path, proto), "contradict")


def test_every_custom_operator_is_listed(tmp_path: Path) -> None:
    proto = model()
    for index in range(3):
        node = helper.make_node("Magic", ["y"], [f"m{index}"], name=f"magic{index}", domain="com.example")
        proto.graph.node.append(node)
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    error = refused(saved(tmp_path, proto), "3 operators", UnsupportedGraph)
    assert len(error.where) == 3
    assert "magic1" in error.where[1] and "com.example::Magic" in error.where[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, value: float) -> None:
    weight = np.ones((2, 4, 1, 1), np.float32)
    weight[1, 2] = value
    error = refused(saved(tmp_path, model(w=weight)), "NaN or Inf", WeightsRefused)
    assert "'w'" in error.where[0] and "conv" in error.where[0]


def test_infinite_bounds_and_masks_are_fine(tmp_path: Path) -> None:
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"])]
    graph = graph_of(nodes, {"x": (2,)}, {"low": np.float32(0), "high": np.float32(np.inf)})
    read_onnx(saved(tmp_path, graph.copy_proto()))


def test_tensors_whose_data_does_not_fit_are_refused(tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer[0].dims[0] = 2**40
    refused(saved(tmp_path, proto), "its shape needs")
    proto = model()
    proto.graph.initializer[0].dims[0] = -1
    refused(saved(tmp_path, proto), "negative")


def test_future_versions_are_refused(tmp_path: Path) -> None:
    proto = model()
    proto.ir_version = 999
    refused(saved(tmp_path, proto), "IR version 999")
    proto = model()
    proto.opset_import[0].version = 999
    refused(saved(tmp_path, proto), "999")


def function_model(depth: int, *, recursive: bool = False) -> onnx.ModelProto:
    """Nested functions, each calling the next twice: 2**depth nodes."""
    proto = model()
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    for level in range(depth):
        last = level + 1 == depth
        call = "Relu" if last and not recursive else f"f{0 if last else level + 1}"
        domain = "" if call == "Relu" else "f"
        body = [
            helper.make_node(call, ["a"], ["b"], domain=domain),
            helper.make_node(call, ["b"], ["c"], domain=domain),
        ]
        proto.functions.append(helper.make_function("f", f"f{level}", ["a"], ["c"], body, opsets))
    proto.graph.node[1].CopyFrom(helper.make_node("f0", ["c"], ["y"], name="call", domain="f"))
    proto.opset_import.append(helper.make_opsetid("f", 1))
    return proto


def test_local_functions_are_expanded(tmp_path: Path) -> None:
    graph = read_onnx(saved(tmp_path, function_model(2)))
    assert [node.op_type for node in graph.nodes] == ["Conv", "Relu", "Relu", "Relu", "Relu"]
    assert not graph.proto.functions


def test_functions_that_explode_or_call_themselves_are_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, function_model(40)), "expand to")
    refused(saved(tmp_path, function_model(2, recursive=True)), "calls itself")


def test_empty_and_doubled_node_names_become_unique(tmp_path: Path) -> None:
    proto = model()
    proto.graph.node[0].name = "same"
    proto.graph.node[1].name = "same"
    assert [node.name for node in read_onnx(saved(tmp_path, proto)).nodes] == ["same", "same_1"]
    for node in proto.graph.node:
        node.name = ""
    graph = read_onnx(saved(tmp_path, proto))
    assert [node.name for node in graph.nodes] == ["Conv_0", "Relu_1"]
    assert [path for _, path in graph.places()] == ["Conv_0", "Relu_1"]


# ---- external data


def with_external(tmp_path: Path, change: Callable[[dict[str, str]], None]) -> Path:
    proto = model()
    tensor = proto.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(bytes(16) + tensor.raw_data)
    entries = {"location": "weights.bin", "offset": "16", "length": "32"}
    change(entries)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return saved(tmp_path, proto)


def test_external_data_in_the_models_folder_is_loaded(tmp_path: Path) -> None:
    path = with_external(tmp_path, lambda entries: None)
    graph = read_onnx(path)
    np.testing.assert_array_equal(graph.constant("w"), np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1))
    assert external_files(path) == (tmp_path / "weights.bin",)
    assert not graph.constants["w"].external_data


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights.bin", "a/../../weights.bin", "..\\weights.bin", "", "C:\\x", "file:///etc/passwd"],
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    refused(with_external(folder, lambda entries: entries.update(location=location)), "outside the model's folder")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    refused(with_external(folder, lambda entries: entries.update(location="link.bin")), "by a link")
    (folder / "up").symlink_to(tmp_path)
    refused(with_external(folder, lambda entries: entries.update(location="up/secret.bin")), "by a link")


def test_external_data_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(with_external(tmp_path, lambda entries: entries.update(location="pipe")), "missing")
    refused(with_external(tmp_path, lambda entries: entries.update(location="gone.bin")), "missing")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"offset": "40"}, "does not fit"),
        ({"offset": "-1"}, "not a number"),
        ({"length": "31"}, "does not fit"),
        ({"length": "99999999999999999999"}, "not a number"),
        ({"offset": "999999999999999999"}, "does not fit"),
        ({"offset": "0x10"}, "not a number"),
    ],
)
def test_external_data_beyond_its_file_is_refused(tmp_path: Path, entry: dict[str, str], what: str) -> None:
    refused(with_external(tmp_path, lambda entries: entries.update(entry)), what)


# ---- shapes


def test_symbols_are_bound_and_everything_is_inferred_again(tmp_path: Path) -> None:
    graph = read_onnx(saved(tmp_path, model()))
    assert graph.inputs[0].shape == ("N", 4, 5, 5)
    assert graph.outputs[0].shape == ("N", 2, 5, 5)
    assert bind_batch(graph, 3).outputs[0].shape == (3, 2, 5, 5)
    bound = bind_shapes(graph, [TensorSpec("x", (7, 4, 5, 5))])
    assert [v.type.tensor_type.shape.dim[0].dim_value for v in bound.proto.graph.value_info] == [7]
    assert graph.inputs[0].shape == ("N", 4, 5, 5)


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 3, 5, 5), (1, 4, 5, 6)])
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    graph = read_onnx(saved(tmp_path, model()))
    with pytest.raises(ModelRefused):
        bind_shapes(graph, [TensorSpec("x", shape)])


def test_one_symbol_has_one_size() -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    graph = graph_of(nodes, {"a": ("N", 2), "b": ("N", 2)}, {})
    with pytest.raises(ModelRefused, match="both 2 and 3"):
        bind_shapes(graph, [TensorSpec("a", (2, 2)), TensorSpec("b", (3, 2))])
    assert bind_shapes(graph, [TensorSpec("a", (2, 2))]).inputs[1].shape == (2, 2)


def test_trusted_graphs_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    assert load_trusted(path).proto == onnx.load(path)
    path.write_bytes(b"")
    with pytest.raises(ModelRefused, match="empty"):
        load_trusted(path)


def test_typed_data_is_read_too(tmp_path: Path) -> None:
    proto = model()
    array = numpy_helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[0].CopyFrom(helper.make_tensor("w", onnx.TensorProto.FLOAT, array.shape, array.flatten()))
    np.testing.assert_array_equal(read_onnx(saved(tmp_path, proto)).constant("w"), array)
    del proto.graph.initializer[0].float_data[3:]
    refused(saved(tmp_path, proto), "does not fit")
