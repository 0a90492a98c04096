"""Each pass on the cases that it is for, and on those that it must leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cnncc.compiler.passes.dedupe import dedupe
from cnncc.compiler.passes.fix_reshapes import fix_reshapes
from cnncc.compiler.passes.fold_batchnorm import fold_batchnorm
from cnncc.compiler.passes.fold_constants import fold_constants
from cnncc.compiler.passes.infer_shapes import infer_shapes
from cnncc.compiler.passes.normalize import normalize
from cnncc.compiler.passes.pipeline import clean
from cnncc.compiler.passes.remove_dead import remove_dead
from cnncc.compiler.passes.remove_identity import remove_identity
from cnncc.compiler.passes.split_sequences import split_sequences
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from tests.graph.graphs import graph_of

X = {"x": (2, 4, 6, 6)}


def kinds(graph: OnnxGraph) -> list[str]:
    return [node.op_type for node in graph.nodes]


def same(before: OnnxGraph, after: OnnxGraph, tolerance: float = 0.0) -> None:
    feeds = random_feeds(before.inputs, 5, batch=2)
    old, new = Reference(before).run(feeds), Reference(after).run(feeds)
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value, rtol=tolerance, atol=tolerance)


def test_normalize_moves_constants_and_drops_initializers_from_the_inputs() -> None:
    tensor = onnx.numpy_helper.from_array(np.float32([1, 2]))
    nodes = [
        helper.make_node("Constant", [], ["a"], value=tensor),
        helper.make_node("Constant", [], ["b"], value_float=2.0),
        helper.make_node("Constant", [], ["c"], value_ints=[3]),
        helper.make_node("Add", ["x", "a"], ["d"]),
        helper.make_node("Mul", ["d", "b"], ["e"]),
        helper.make_node("Pow", ["e", "c"], ["f"]),
        helper.make_node("Add", ["f", "w"], ["y"]),
    ]
    graph = graph_of(nodes, {"x": (1, 2)}, {"w": np.float32([5, 6])})
    proto = graph.copy_proto()
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2]))
    old = OnnxGraph(proto)
    new = normalize(old)
    assert kinds(new) == ["Add", "Mul", "Pow", "Add"]
    assert [value.name for value in new.proto.graph.input] == ["x"]
    assert len({node.name for node in new.nodes}) == 4
    same(old, new)


def test_normalize_makes_node_names_unique_and_the_first_bearer_keeps_its_name() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n"),
        helper.make_node("Neg", ["a"], ["b"], name="n"),
        helper.make_node("Neg", ["b"], ["c"], name="n_1"),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    names = [node.name for node in normalize(graph_of(nodes, X, {})).nodes]
    assert names == ["n", "n_2", "n_1", "Neg_3"]


def test_normalize_gives_a_constant_output_a_node() -> None:
    nodes = [helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0]), helper.make_node("Relu", ["x"], ["z"])]
    graph = graph_of(nodes, {"x": (2,)}, {}, outputs=("y", "z"))
    new = normalize(graph)
    assert sorted(kinds(new)) == ["Identity", "Relu"]
    same(graph, new)
    same(graph, clean(graph)[0])


def test_fold_constants_computes_what_is_known() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["flat", "wt"], ["y"]),
    ]
    constants = {"first": np.int64([0]), "rest": np.int64([-1]), "w": np.ones((3, 144), np.float32)}
    graph = graph_of(nodes, X, constants)
    folded = fold_constants(graph)
    assert kinds(folded) == ["Reshape", "MatMul"]
    same(graph, folded)


def test_fold_constants_keeps_an_output_that_is_constant() -> None:
    nodes = [helper.make_node("Shape", ["x"], ["y"])]
    graph = graph_of(nodes, X, {})
    folded = fold_constants(graph)
    assert kinds(folded) == ["Identity"]
    assert fold_constants(folded).digest == folded.digest
    same(graph, folded)


def test_fold_constants_does_not_fill_memory_for_a_hostile_shape() -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["total"], keepdims=0),
        helper.make_node("Add", ["x", "total"], ["y"]),
    ]
    graph = graph_of(nodes, {"x": (2,)}, {"shape": np.int64([2**20, 2**20])})
    assert kinds(fold_constants(graph)) == ["ConstantOfShape", "ReduceSum", "Add"]


def test_fold_constants_leaves_random_operators_alone() -> None:
    nodes = [
        helper.make_node("RandomNormal", [], ["r"], shape=[2], seed=1.0),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    assert kinds(fold_constants(graph_of(nodes, {"x": (2,)}, {}))) == ["RandomNormal", "Add"]


IDLE: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("identity", "Identity", [], {}),
    ("dropout", "Dropout", [], {}),
    ("dropout with training off", "Dropout", [np.float32(0.5), np.bool_(False)], {}),
    ("cast to the same type", "Cast", [], {"to": onnx.TensorProto.FLOAT}),
    ("reshape to the same shape", "Reshape", [np.int64([2, 4, 6, 6])], {}),
    ("transpose in order", "Transpose", [], {"perm": [0, 1, 2, 3]}),
    ("slice of everything", "Slice", [np.int64([0]), np.int64([6]), np.int64([3]), np.int64([1])], {}),
    ("concat of one", "Concat", [], {"axis": 1}),
    ("pad by nothing", "Pad", [np.int64([0] * 8)], {}),
    ("expand to the same shape", "Expand", [np.int64([1, 4, 6, 6])], {}),
    ("tile once", "Tile", [np.int64([1, 1, 1, 1])], {}),
]

BUSY: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("cast to another type", "Cast", [], {"to": onnx.TensorProto.DOUBLE}),
    ("transpose that swaps equal sizes", "Transpose", [], {"perm": [0, 1, 3, 2]}),
    ("slice backwards", "Slice", [np.int64([-1]), np.int64([-99]), np.int64([3]), np.int64([-1])], {}),
    ("pad that moves", "Pad", [np.int64([0, 0, 0, 1, 0, 0, 0, -1])], {}),
    ("tile twice", "Tile", [np.int64([1, 1, 1, 2])], {}),
]


def _between(operator: str, extra: list[Any], attributes: dict[str, Any]) -> OnnxGraph:
    names = [f"k{index}" for index in range(len(extra))]
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node(operator, ["a", *names], ["b"], **attributes),
        helper.make_node("Neg", ["b"], ["y"]),
    ]
    return graph_of(nodes, X, dict(zip(names, extra, strict=True)))


@pytest.mark.parametrize(("title", "operator", "extra", "attributes"), IDLE, ids=[case[0] for case in IDLE])
def test_idle_nodes_go(title: str, operator: str, extra: list[Any], attributes: dict[str, Any]) -> None:
    graph = _between(operator, extra, attributes)
    removed = remove_identity(graph)
    assert kinds(removed) == ["Relu", "Neg"]
    same(graph, removed)


@pytest.mark.parametrize(("title", "operator", "extra", "attributes"), BUSY, ids=[case[0] for case in BUSY])
def test_nodes_that_do_something_stay(title: str, operator: str, extra: list[Any], attributes: dict[str, Any]) -> None:
    graph = _between(operator, extra, attributes)
    assert kinds(remove_identity(graph)) == ["Relu", operator, "Neg"]


def test_a_dropout_whose_mask_is_read_stays() -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["y", "mask"]),
        helper.make_node("Not", ["mask"], ["z"]),
    ]
    graph = graph_of(nodes, X, {}, outputs=("y", "z"))
    assert kinds(remove_identity(graph)) == ["Dropout", "Not"]


def test_names_of_the_interface_stay() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["copied"]),
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["y"]),
        helper.make_node("Identity", ["a"], ["again"]),
    ]
    graph = graph_of(nodes, X, {}, outputs=("copied", "y", "again"))
    removed = remove_identity(graph)
    assert [spec.name for spec in removed.outputs] == ["copied", "y", "again"]
    assert sorted(kinds(removed)) == ["Identity", "Identity", "Relu"]
    same(graph, removed)


def test_remove_dead_drops_nodes_outputs_and_weights() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y", "unused"], kernel_shape=[2, 2]),
        helper.make_node("Add", ["x", "w"], ["dead"]),
    ]
    graph = graph_of(nodes, X, {"w": np.float32(1)})
    swept = remove_dead(graph)
    assert kinds(swept) == ["MaxPool"]
    assert list(swept.proto.graph.node[0].output) == ["y"]
    assert not swept.constants
    same(graph, swept)


def _normalized(before: list[Any], extra: dict[str, Any], shape: tuple[int, ...], channels: int) -> OnnxGraph:
    random = np.random.default_rng(1)
    numbers = {
        "gamma": random.uniform(0.5, 2, channels), "beta": random.normal(size=channels),
        "mean": random.normal(size=channels), "var": random.uniform(0.3, 3, channels),
    }  # fmt: skip
    nodes = [
        *before,
        helper.make_node("BatchNormalization", ["a", *numbers], ["y"], name="bn", epsilon=1e-3),
    ]
    constants = {**extra, **{name: value.astype(np.float32) for name, value in numbers.items()}}
    return graph_of(nodes, {"x": shape}, constants)


def _weights(*shape: int) -> Any:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


FOLDS = [
    ("Conv", (4, 3, 3, 3), (2, 3, 6, 6), {"group": 1}, True),
    ("Conv", (4, 3, 3, 3), (2, 3, 6, 6), {"group": 1}, False),
    ("Conv", (4, 1, 3, 3), (2, 4, 6, 6), {"group": 4}, True),
    ("Conv", (4, 3, 3), (2, 3, 6), {"group": 1}, True),
    ("ConvTranspose", (3, 4, 3, 3), (2, 3, 6, 6), {"group": 1}, True),
    ("ConvTranspose", (6, 2, 3, 3), (2, 6, 6, 6), {"group": 2}, False),
    ("Gemm", (3, 4), (2, 3), {}, True),
    ("Gemm", (4, 3), (2, 3), {"transB": 1, "alpha": 0.5}, False),
]


@pytest.mark.parametrize(("operator", "weight", "x", "attributes", "bias"), FOLDS)
def test_normalization_is_folded_into_the_weights_before_it(
    operator: str, weight: tuple[int, ...], x: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    extra = {"w": _weights(*weight), **({"b": _weights(4)} if bias else {})}
    graph = _normalized([helper.make_node(operator, inputs, ["a"], name="op", **attributes)], extra, x, 4)
    folded = fold_batchnorm(graph)
    assert kinds(folded) == [operator]
    assert fold_batchnorm(folded).digest == folded.digest
    same(graph, folded, 2e-5)


def test_normalization_of_a_value_with_another_reader_becomes_mul_and_add() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], name="op"), helper.make_node("Relu", ["a"], ["r"], name="r")]
    graph = _normalized(nodes, {"w": _weights(4, 3, 1, 1)}, (2, 3, 6, 6), 4)
    proto = graph.copy_proto()
    proto.graph.output.append(helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [2, 4, 6, 6]))
    graph = OnnxGraph(proto)
    folded = fold_batchnorm(graph)
    assert kinds(folded) == ["Conv", "Relu", "Mul", "Add"]
    same(graph, folded, 2e-5)


def test_weights_that_two_convolutions_share_are_folded_apart() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["p"], name="first"),
        helper.make_node("Conv", ["p", "w"], ["a"], name="second"),
    ]
    graph = _normalized(nodes, {"w": _weights(4, 4, 1, 1)}, (2, 4, 6, 6), 4)
    folded = fold_batchnorm(graph)
    assert kinds(folded) == ["Conv", "Conv"]
    same(graph, folded, 2e-5)


def test_normalization_that_cannot_be_expressed_stays() -> None:
    graph = _normalized([helper.make_node("Relu", ["x"], ["a"])], {}, (2, 4, 6, 6), 4)
    proto = graph.copy_proto()
    for tensor in proto.graph.initializer:
        if tensor.name == "var":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32([-1, 1, 1, 1]), "var"))
    assert kinds(fold_batchnorm(OnnxGraph(proto))) == ["Relu", "BatchNormalization"]


def test_equal_weights_become_one() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["b"]),
        helper.make_node("Conv", ["b", "w3"], ["y"]),
    ]
    weight = _weights(4, 4, 1, 1)
    graph = graph_of(nodes, X, {"w1": weight, "w2": weight.copy(), "w3": weight + 1})
    merged = dedupe(graph)
    assert set(merged.constants) == {"w1", "w3"}
    same(graph, merged)


def test_negative_zero_is_not_zero() -> None:
    nodes = [helper.make_node("Div", ["x", "w1"], ["a"]), helper.make_node("Div", ["a", "w2"], ["y"])]
    graph = graph_of(nodes, X, {"w1": np.float32([0.0]), "w2": np.float32([-0.0])})
    assert len(dedupe(graph).constants) == 2


def test_a_reshape_with_one_open_size_gets_a_constant_shape() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"], allowzero=1),
    ]
    graph = graph_of(nodes, {"x": ("N", 4, 6, 6)}, {"rest": np.int64([144])})
    fixed = remove_dead(fix_reshapes(infer_shapes(graph)))
    assert kinds(fixed) == ["Reshape"]
    assert [list(array) for name in fixed.constants if (array := fixed.constant(name)) is not None] == [[-1, 144]]
    same(graph, fixed)


@pytest.mark.parametrize(("split", "keepdims"), [([3, 1], 1), (3, 1), (None, 1), (None, 0)])
def test_sequences_of_parts_become_split(split: Any, keepdims: int) -> None:
    parts = ["part"] if split is not None else []
    nodes = [
        helper.make_node("SplitToSequence", ["x", *parts], ["s"], axis=1, keepdims=keepdims, name="split"),
        helper.make_node("SequenceAt", ["s", "first"], ["y"]),
        helper.make_node("SequenceAt", ["s", "last"], ["z"]),
    ]
    constants: dict[str, Any] = {"first": np.int64(0), "last": np.int64(-1)}
    if split is not None:
        constants["part"] = np.int64(split)
    graph = graph_of(nodes, X, constants, outputs=("y", "z"))
    replaced = split_sequences(graph)
    assert "SplitToSequence" not in kinds(replaced)
    assert "Split" in kinds(replaced)
    same(graph, clean(graph)[0])


def test_a_sequence_read_at_an_unknown_place_stays() -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"], axis=1),
        helper.make_node("SequenceAt", ["s", "i"], ["y"]),
    ]
    graph = graph_of(nodes, {**X, "i": ()}, {}, dtypes={"i": onnx.TensorProto.INT64})
    assert kinds(split_sequences(graph)) == ["SplitToSequence", "SequenceAt"]
