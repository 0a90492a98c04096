"""Every operator that CNNs use, against ONNX Runtime: one small graph each."""

# ruff: noqa: E501  (the table reads better with one case a line)

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.target import LlvmTarget
from tests.targets.conformance import feeds_of, graph_of
from tests.targets.llvm.running import kernels_of, run_engine, run_graph

X = [1, 6, 9, 11]
RNG = np.random.default_rng(3)


def const(*shape: int, dtype: str = "float32") -> np.ndarray:
    return (RNG.standard_normal(shape)).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, "int64")


def floats(*values: float) -> np.ndarray:
    return np.array(values, "float32")


Case = tuple[str, list[Any], Mapping[str, Any]]
CASES: dict[str, Case] = {
    "conv 1×1": ("Conv", [X, const(7, 6, 1, 1), const(7)], {}),
    "conv dilated and strided": ("Conv", [X, const(5, 6, 3, 3)], {"dilations": [2, 1], "strides": [2, 3], "pads": [2, 1, 0, 1]}),
    "conv grouped": ("Conv", [X, const(9, 2, 3, 3), const(9)], {"group": 3, "pads": [1, 1, 1, 1]}),
    "conv depthwise": ("Conv", [X, const(6, 1, 5, 5)], {"group": 6, "pads": [2, 2, 2, 2], "strides": [2, 2]}),
    "conv depth multiplier": ("Conv", [X, const(12, 1, 3, 3)], {"group": 6}),
    "conv same upper": ("Conv", [X, const(4, 6, 4, 4)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv 1-d": ("Conv", [[2, 6, 17], const(4, 3, 5)], {"group": 2, "pads": [2, 2], "strides": [2]}),
    "conv with weights that are an input": ("Conv", [X, [4, 6, 3, 3]], {}),
    "conv one pixel": ("Conv", [[2, 6, 1, 1], const(40, 6, 1, 1)], {}),
    "conv large": ("Conv", [[2, 3, 40, 53], const(13, 3, 7, 7)], {"strides": [2, 2], "pads": [3, 3, 3, 3]}),
    "transposed conv 2×2": ("ConvTranspose", [X, const(6, 4, 2, 2), const(4)], {"strides": [2, 2]}),
    "transposed conv overlapping": ("ConvTranspose", [X, const(6, 4, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    "transposed conv grouped": ("ConvTranspose", [X, const(6, 2, 4, 4)], {"group": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool ceil": ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "max pool padded": ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool dilated": ("MaxPool", [X], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    "average pool": ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "average pool counting padding": ("AveragePool", [X], {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}),
    "average pool ceil": ("AveragePool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "global average pool": ("GlobalAveragePool", [X], {}),
    "global max pool": ("GlobalMaxPool", [X], {}),
    "resize nearest": ("Resize", [X, None, floats(1, 1, 2, 3)], {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "resize linear half pixel": ("Resize", [X, None, floats(1, 1, 2, 2)], {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}),
    "resize linear half pixel down": ("Resize", [X, None, None, ints(1, 6, 5, 7)], {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}),
    "resize linear align corners": ("Resize", [X, None, None, ints(1, 6, 20, 17)], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    "resize cubic": ("Resize", [X, None, None, ints(1, 6, 20, 17)], {"mode": "cubic", "cubic_coeff_a": -0.75, "coordinate_transformation_mode": "half_pixel"}),
    "resize cubic align corners": ("Resize", [X, None, None, ints(1, 6, 20, 17)], {"mode": "cubic", "cubic_coeff_a": -0.75, "coordinate_transformation_mode": "align_corners"}),
    "resize nearest half pixel": ("Resize", [X, None, None, ints(1, 6, 20, 17)], {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"}),
    "batch normalization": ("BatchNormalization", [X, const(6), const(6), const(6), np.abs(const(6)) + 1], {}),
    "instance normalization": ("InstanceNormalization", [X, const(6), const(6)], {}),
    "group normalization": ("GroupNormalization", [X, const(6), const(6)], {"num_groups": 3}),
    "layer normalization": ("LayerNormalization", [X, const(11), const(11)], {"axis": -1}),
    "lrn": ("LRN", [X], {"size": 3, "alpha": 0.02, "bias": 1.5}),
    "prelu": ("PRelu", [X, const(6, 1, 1)], {}),
    "leaky relu": ("LeakyRelu", [X], {"alpha": 0.1}),
    "elu": ("Elu", [X], {"alpha": 0.7}),
    "selu": ("Selu", [X], {}),
    "celu": ("Celu", [X], {"alpha": 1.3}),
    "softplus": ("Softplus", [X], {}),
    "softsign": ("Softsign", [X], {}),
    "mish": ("Mish", [X], {}),
    "gelu": ("Gelu", [X], {}),
    "gelu tanh": ("Gelu", [X], {"approximate": "tanh"}),
    "erf": ("Erf", [X], {}),
    "tanh": ("Tanh", [X], {}),
    "sigmoid": ("Sigmoid", [X], {}),
    "hard sigmoid": ("HardSigmoid", [X], {"alpha": 0.1667}),
    "hard swish": ("HardSwish", [X], {}),
    "clip": ("Clip", [X, np.float32(-0.5), np.float32(1)], {}),
    "clip above only": ("Clip", [X, None, np.float32(1)], {}),
    "exp": ("Exp", [X], {}),
    "pow": ("Pow", [X, np.float32(2)], {}),
    "floor": ("Floor", [X], {}),
    "round": ("Round", [X], {}),
    "softmax channels": ("Softmax", [X], {"axis": 1}),
    "softmax last": ("Softmax", [X], {"axis": -1}),
    "log softmax": ("LogSoftmax", [X], {"axis": 1}),
    "concat": ("Concat", [X, [1, 3, 9, 11]], {"axis": 1}),
    "slice": ("Slice", [X, ints(1, 8), ints(5, 0), ints(1, 3), ints(2, -2)], {}),
    "pad": ("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(0.5)], {}),
    "pad reflect": ("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    "pad edge": ("Pad", [X, ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "edge"}),
    "reduce mean": ("ReduceMean", [X, ints(2, 3)], {"keepdims": 1}),
    "reduce mean channels": ("ReduceMean", [X, ints(1)], {"keepdims": 0}),
    "reduce max": ("ReduceMax", [X, ints(-1)], {}),
    "reduce sum all": ("ReduceSum", [X], {"keepdims": 0}),
    "reduce l2": ("ReduceL2", [X, ints(1)], {}),
    "argmax": ("ArgMax", [X], {"axis": 1}),
    "transpose": ("Transpose", [X], {"perm": [0, 2, 3, 1]}),
    "reshape": ("Reshape", [X, ints(1, 2, 3, -1)], {}),
    "flatten": ("Flatten", [X], {}),
    "squeeze": ("Squeeze", [[1, 6, 1, 1], ints(2, 3)], {}),
    "unsqueeze": ("Unsqueeze", [[6, 5], ints(0, 3)], {}),
    "expand": ("Expand", [[1, 6, 1, 1], ints(2, 6, 3, 4)], {}),
    "tile": ("Tile", [X, ints(1, 2, 1, 3)], {}),
    "gather": ("Gather", [X, ints(0, 2, -1)], {"axis": 1}),
    "where": ("Where", [(TensorProto.BOOL, X), X, np.float32(0)], {}),
    "depth to space": ("DepthToSpace", [[1, 8, 3, 5]], {"blocksize": 2, "mode": "CRD"}),
    "space to depth": ("SpaceToDepth", [[1, 2, 4, 6]], {"blocksize": 2}),
    "gemm": ("Gemm", [[3, 40], const(70, 40), const(70)], {"transB": 1, "alpha": 0.5}),
    "gemm transposed left": ("Gemm", [[40, 3], const(40, 17), const(1, 17)], {"transA": 1, "beta": 2.0}),
    "matmul": ("MatMul", [[2, 5, 7, 40], const(40, 33)], {}),
    "matmul of two inputs": ("MatMul", [[2, 3, 7, 20], [2, 3, 20, 90]], {}),
    "matmul vector": ("MatMul", [[5, 8], [8]], {}),
    "sum": ("Sum", [X, X, [1, 6, 1, 1]], {}),
    "max of two": ("Max", [X, X], {}),
    "div": ("Div", [X, [1, 6, 1, 1]], {}),
    "integer add": ("Add", [(TensorProto.INT64, [3, 4]), ints(1, 2, 3, 4)], {}),
    "cast": ("Cast", [X], {"to": TensorProto.INT32}),
    "identity": ("Identity", [X], {}),
    "scalar": ("Mul", [[], np.float32(3)], {}),
    "double": ("Sqrt", [(TensorProto.DOUBLE, [4, 5])], {}),
}  # fmt: skip


def graph_of_case(case: Case) -> OnnxGraph:
    op, operands, attributes = case
    names, inputs, weights = [], {}, []
    for position, operand in enumerate(operands):
        name = "" if operand is None else f"i{position}"
        names.append(name)
        if isinstance(operand, np.ndarray | np.generic):
            weights.append(numpy_helper.from_array(np.asarray(operand), name))
        elif operand is not None:
            inputs[name] = operand
    node = helper.make_node(op, names, ["y"], "the_node", **attributes)
    untyped = graph_of([node], inputs, {"y": None}, weights, opset=21).proto
    untyped.graph.output[0].ClearField("type")
    typed = shape_inference.infer_shapes(untyped, strict_mode=True)
    if not typed.graph.output[0].type.HasField("tensor_type"):  # onnx infers none for GroupNormalization
        typed.graph.output[0].type.CopyFrom(typed.graph.input[0].type)
    return OnnxGraph(typed)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(name: str, tmp_path: Path) -> None:
    graph = graph_of_case(CASES[name])
    profile = resolve_profile()
    engine = LlvmTarget(profile).build(graph, BuildOptions(profile), tmp_path)
    feeds = feeds_of(graph)
    if CASES[name][0] == "Sqrt":
        feeds = {key: np.abs(value) for key, value in feeds.items()}
    (got,) = run_engine(engine, "main", list(feeds.values()))
    want = Reference(graph).run(feeds)["y"]
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6 * max(1.0, float(np.abs(want).max())))


def test_swish_of_operator_set_24_computes_what_onnx_runtime_computes(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, X) for name in ("x", "y")]
    body = helper.make_graph(
        [helper.make_node("Swish", ["x"], ["y"], name="swish", alpha=1.3)], "g", *[[v] for v in values]
    )
    graph = OnnxGraph(helper.make_model(body, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))
    profile = resolve_profile()
    engine = LlvmTarget(profile).build(graph, BuildOptions(profile), tmp_path)
    feeds = feeds_of(graph)
    (got,) = run_engine(engine, "main", list(feeds.values()))
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("divisor", "multiplies"),
    [
        (np.float32(np.sqrt(2)), True),
        (floats(-3, 0.1, 7e30, 1e-30, 5, 1).reshape(6, 1, 1), True),
        (floats(3, 0, 1, 2, 5, 1).reshape(6, 1, 1), False),
        (np.float32(np.inf), False),
        (np.float32(np.nan), False),
        (np.float32(1e-40), False),
        (np.float32(3e38), False),
    ],
    ids=["a number", "channels", "zero", "infinity", "nan", "subnormal", "huge"],
)
def test_a_division_by_constants_multiplies_where_that_gives_the_same(divisor: Any, multiplies: bool) -> None:
    graph = graph_of_case(("Div", [X, divisor], {}))
    assert ("multiply" in kernels_of(graph)[0]) == multiplies
    x = np.random.default_rng(0).standard_normal(X).astype("float32")
    x.flat[:6] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-42]
    (got,) = run_graph(graph, {"i0": x})
    want = Reference(graph).run({"i0": x})["y"]
    np.testing.assert_allclose(got, want, rtol=1.5e-7, atol=2e-45)


def test_a_division_of_integers_stays_one() -> None:
    node = helper.make_node("Div", ["x", "c"], ["y"], "the_node")
    divisor = numpy_helper.from_array(ints(3), "c")
    graph = graph_of([node], {"x": (TensorProto.INT64, [6])}, {"y": (TensorProto.INT64, [6])}, [divisor])
    (got,) = run_graph(graph, {"x": ints(7, 8, 9, -7, -8, 0)})
    np.testing.assert_array_equal(got, [2, 2, 3, -2, -2, 0])
