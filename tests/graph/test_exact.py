"""float64 evaluation against ONNX Runtime's float32, operator by operator."""

from __future__ import annotations

import itertools
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from cnncc.graph.exact import Exact
from cnncc.graph.exact_ops import group_normalization
from cnncc.graph.feeds import random_feeds
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc_runtime.errors import DataRefused, RunFailed
from tests.graph.graphs import graph_of, one_node

CONV = [
    ((1, 3, 9), (4, 3, 3), {}),
    ((2, 4, 9), (6, 2, 3), {"group": 2, "pads": [1, 2], "strides": [2]}),
    ((1, 3, 9, 8), (4, 3, 3, 2), {"pads": [1, 0, 2, 1]}),
    ((1, 3, 9, 8), (4, 3, 3, 3), {"dilations": [2, 1], "strides": [1, 2]}),
    ((1, 4, 9, 8), (8, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((1, 16, 9, 8), (16, 1, 3, 3), {"group": 16, "pads": [1, 0, 1, 2], "strides": [2, 1], "dilations": [1, 2]}),
    ((1, 3, 9, 8), (4, 3, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 3, 9, 8), (4, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ((1, 3, 9, 8), (4, 3, 3, 3), {"auto_pad": "VALID"}),
    ((1, 2, 5, 6, 7), (4, 2, 3, 3, 3), {"pads": [1, 1, 1, 1, 1, 1]}),
    ((1, 8, 5, 6, 7), (8, 1, 2, 3, 3), {"group": 8, "strides": [1, 2, 2]}),
]


@pytest.mark.parametrize(("x", "w", "attributes"), CONV)
def test_convolution_matches_onnx_runtime(x, w, attributes):
    agree(one_node("Conv", {"x": x, "w": w, "b": (w[0],)}, **attributes))


TRANSPOSED = [
    ((1, 3, 5), (3, 4, 3), {"strides": [2]}),
    ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    ((1, 4, 5, 6), (4, 3, 3, 2), {"group": 2, "pads": [0, 1, 1, 0], "dilations": [2, 1]}),
    ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [3, 2], "output_shape": [14, 11]}),
    ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 3, 4, 5), (2, 3, 2, 2, 2), {"strides": [2, 1, 2]}),
]


@pytest.mark.parametrize(("x", "w", "attributes"), TRANSPOSED)
def test_transposed_convolution_matches_onnx_runtime(x, w, attributes):
    outputs = w[1] * attributes.get("group", 1)
    agree(one_node("ConvTranspose", {"x": x, "w": w, "b": (outputs,)}, **attributes))


POOLING = [
    ((1, 2, 9), {"kernel_shape": [3]}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2]}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((1, 2, 7, 7), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [0, 0, 1, 1]}),
    ((1, 2, 10, 10), {"kernel_shape": [3, 3], "strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 5, 6, 7), {"kernel_shape": [2, 3, 3], "strides": [1, 2, 2], "pads": [0, 1, 1, 1, 1, 1]}),
]


@pytest.mark.parametrize(("x", "attributes"), POOLING)
def test_max_pooling_matches_onnx_runtime(x, attributes):
    agree(one_node("MaxPool", {"x": x}, **attributes))
    agree(one_node("MaxPool", {"x": x}, outputs=("y", "indices"), **attributes))


def test_dilated_and_column_major_max_pooling_match_onnx_runtime():
    agree(one_node("MaxPool", {"x": (1, 2, 9, 8)}, kernel_shape=[2, 3], dilations=[2, 2]))
    shape, outputs = {"x": (2, 2, 5, 4)}, ("y", "indices")
    agree(one_node("MaxPool", shape, outputs=outputs, kernel_shape=[2, 2], storage_order=1))


@pytest.mark.parametrize(("x", "attributes"), POOLING)
@pytest.mark.parametrize("count_include_pad", [0, 1])
def test_average_pooling_matches_onnx_runtime(x, attributes, count_include_pad):
    agree(one_node("AveragePool", {"x": x}, opset=19, count_include_pad=count_include_pad, **attributes))


RESIZE = list(
    itertools.product(
        ["linear", "cubic"],
        ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"],
        [(1.0, 1.0, 2.0, 2.0), (1.0, 1.0, 0.6, 1.7)],
    )
)


@pytest.mark.parametrize(("mode", "coordinates", "scales"), RESIZE)
def test_resize_matches_onnx_runtime(mode, coordinates, scales):
    graph = one_node(
        "Resize",
        {"x": (1, 2, 7, 9)},
        constants={"roi": np.zeros(0, np.float32), "scales": np.float32(scales)},
        mode=mode,
        coordinate_transformation_mode=coordinates,
    )
    agree(graph, tolerance=1e-5)


@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("scales", [(1, 1, 2, 2), (1, 1, 0.5, 1.5), (1, 1, 3, 0.7)])
def test_nearest_resize_matches_onnx_runtime(nearest, coordinates, scales):
    graph = one_node(
        "Resize",
        {"x": (1, 2, 7, 9)},
        constants={"roi": np.zeros(0, np.float32), "scales": np.float32(scales)},
        mode="nearest",
        nearest_mode=nearest,
        coordinate_transformation_mode=coordinates,
    )
    agree(graph)


def test_resize_to_sizes_and_with_a_kernel_of_its_own_matches_onnx_runtime():
    constants = {"roi": np.zeros(0, np.float32), "scales": np.zeros(0, np.float32), "sizes": np.int64([1, 2, 5, 20])}
    agree(one_node("Resize", {"x": (1, 2, 7, 9)}, constants=constants, mode="linear"), tolerance=1e-5)
    agree(
        one_node(
            "Resize", {"x": (1, 2, 7, 9)}, constants=constants, mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1
        ),
        tolerance=1e-5,
    )


PLAIN = (
    "Relu Sigmoid Tanh Erf Exp Softplus HardSwish Elu Selu Celu Mish GlobalAveragePool GlobalMaxPool ReduceMean "
    "Softsign ThresholdedRelu Flatten Neg Abs"
)
ELEMENTWISE = [
    *((name, {}) for name in PLAIN.split()),
    ("LeakyRelu", {"alpha": 0.1}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    ("Softmax", {"axis": 1}),
    ("LogSoftmax", {"axis": 1}),
    ("LRN", {"size": 3}),
    ("LRN", {"size": 5, "alpha": 0.2, "beta": 0.6, "bias": 2.0}),
    ("DepthToSpace", {"blocksize": 2}),
]


@pytest.mark.parametrize(("operator", "attributes"), ELEMENTWISE, ids=lambda v: str(v))
def test_unary_operators_match_onnx_runtime(operator, attributes):
    agree(one_node(operator, {"x": (2, 8, 6, 4)}, **attributes))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_matches_onnx_runtime(approximate):
    agree(one_node("Gelu", {"x": (2, 8, 6)}, opset=20, approximate=approximate), tolerance=1e-6)


def test_normalizations_match_onnx_runtime():
    x, c = (2, 6, 5, 4), (6,)
    positive = {"m": np.float32([0.1, 0.2, -0.3, 0.4, 0, 1]), "v": np.float32([0.5, 1, 2, 0.1, 1, 3])}
    agree(one_node("BatchNormalization", {"x": x, "s": c, "b": c}, constants=positive, epsilon=1e-3))
    agree(one_node("InstanceNormalization", {"x": x, "s": c, "b": c}))
    agree(one_node("LayerNormalization", {"x": x, "s": (4,), "b": (4,)}))
    agree(one_node("LayerNormalization", {"x": x, "s": (5, 4)}, axis=-2))


def test_group_normalization_matches_pytorch():
    random = np.random.default_rng(0)
    x, scale, bias = random.normal(size=(2, 6, 5, 4)), random.normal(size=6), random.normal(size=6)
    wanted = torch.nn.functional.group_norm(torch.from_numpy(x), 3, torch.from_numpy(scale), torch.from_numpy(bias))
    np.testing.assert_allclose(group_normalization(x, scale, bias, num_groups=3), wanted.numpy(), rtol=1e-12)


def test_products_match_onnx_runtime():
    agree(one_node("Gemm", {"a": (3, 4), "b": (4, 5), "c": (5,)}, alpha=0.5, beta=2.0))
    agree(one_node("Gemm", {"a": (4, 3), "b": (5, 4)}, transA=1, transB=1))
    agree(one_node("MatMul", {"a": (2, 3, 4), "b": (4, 5)}))
    agree(one_node("MatMul", {"a": (2, 1, 3, 4), "b": (5, 4, 6)}))
    agree(one_node("Einsum", {"a": (2, 3, 4), "b": (2, 4, 5)}, equation="bij,bjk->bik"))


def test_float64_really_is_float64():
    """A sum that float32 cannot hold: 1e8 + 1 − 1e8."""
    big = np.float32(1e8)
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["c", "big"], ["a"]),
        helper.make_node("Sub", ["a", "big"], ["y"]),
    ]
    graph = graph_of(nodes, {"x": (3,)}, {"big": np.array([big])})
    feeds = {"x": np.float32([1, 2, 0.5])}
    assert np.array_equal(Exact(graph).run(feeds)["y"], [1, 2, 0.5])
    assert not np.array_equal(Reference(graph).run(feeds)["y"], feeds["x"])


def test_constants_in_attributes_are_widened():
    nodes = [
        helper.make_node("Constant", [], ["one"], value_float=0.1),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["x", "one"], ["a"]),
        helper.make_node("Add", ["a", "zeros"], ["y"]),
    ]
    result = Exact(graph_of(nodes, {"x": (3,)}, {})).run({"x": np.float32([1, 2, 3])})["y"]
    assert result.dtype == np.float64
    assert np.array_equal(result, np.float64([1, 2, 3]) + np.float64(np.float32(0.1)))


def test_quantized_graphs_keep_their_integers():
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    agree(graph_of(nodes, {"x": (2, 3)}, {"scale": np.float32(0.1), "zero": np.int8(3)}))
    agree(graph_of(nodes, {"x": (2, 3)}, {"scale": np.float32([0.1, 0.2, 0.3]), "zero": np.uint8([3, 0, 128])}))


def test_branches_are_followed():
    def branch(name, value):
        node = helper.make_node("Add", ["x", value], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, 1, [2])])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch("t", "one"), else_branch=branch("e", "zero")),
    ]
    graph = graph_of(nodes, {"x": (2,)}, {"zero": np.float32(0), "one": np.float32(1)})
    for value in ([1, 2], [-1, -2]):
        feeds = {"x": np.float32(value)}
        assert np.allclose(Exact(graph).run(feeds)["y"], Reference(graph).run(feeds)["y"])


def test_random_operators_are_refused():
    with pytest.raises(RunFailed, match="random"):
        Exact(one_node("RandomNormalLike", {"x": (2, 2)}))


def test_feeds_are_checked():
    with pytest.raises(DataRefused, match="missing"):
        Exact(one_node("Relu", {"x": (2, 2)})).run({})


def agree(graph: OnnxGraph, tolerance: float = 2e-6) -> None:
    """float64 and ONNX Runtime's float32 agree to float32 rounding, shapes included."""
    feeds = random_feeds(graph.inputs, 3)
    truth, found = Exact(graph).run(feeds), Reference(graph).run(feeds)
    for name, value in found.items():
        assert truth[name].shape == value.shape, name
        if value.dtype.kind == "f":
            assert truth[name].dtype == np.float64, name
            scale = max(float(np.abs(truth[name]).max()), 1e-3)
            np.testing.assert_allclose(value / scale, truth[name] / scale, atol=tolerance * 4, rtol=0)
        else:
            np.testing.assert_array_equal(value, truth[name])


def test_evaluation_is_fast_and_frees_what_it_no_longer_needs():
    """ResNet-18's first stage at 224×224, stock onnx needs minutes."""
    nodes, constants, name = [], {}, "x"
    for index in range(8):
        constants[f"w{index}"] = np.full((16, 3 if index == 0 else 16, 3, 3), 0.01, np.float32)
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        name = f"r{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["y"]))
    graph = graph_of(nodes, {"x": (1, 3, 224, 224)}, constants)
    start = time.perf_counter()
    Exact(graph).run(random_feeds(graph.inputs))
    assert time.perf_counter() - start < 10
