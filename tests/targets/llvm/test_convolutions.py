"""Convolutions of every shape, with every epilogue, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reference import Reference
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.blocked.convolution import whole_groups
from tests.targets.conformance import graph_of
from tests.targets.llvm.running import run_graph

ACTIVATIONS: dict[str, tuple[NodeProto, ...]] = {
    "none": (),
    "relu": (helper.make_node("Relu", ["a"], ["b"], "act"),),
    "relu6": (helper.make_node("Clip", ["a", "zero", "six"], ["b"], "act"),),
    "silu": (helper.make_node("Sigmoid", ["a"], ["s"], "sigmoid"), helper.make_node("Mul", ["a", "s"], ["b"], "act")),
    "hard swish": (helper.make_node("HardSwish", ["a"], ["b"], "act"),),
    "gelu": (helper.make_node("Gelu", ["a"], ["b"], "act"),),
}


@dataclass(frozen=True)
class Case:
    """A convolution and what follows it."""

    batch: int
    groups: int
    inputs: int
    outputs: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    bias: bool
    residual: bool
    activation: str


def _output(case: Case) -> tuple[int, int]:
    sizes = []
    for axis in (0, 1):
        reach = (case.kernel[axis] - 1) * case.dilation[axis] + 1
        sizes.append((case.image[axis] + case.padding[axis] + case.padding[axis + 2] - reach) // case.stride[axis] + 1)
    return sizes[0], sizes[1]


@st.composite
def cases(draw: Any) -> Case:
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 4]))
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (2, 2), (1, 3), (7, 1), (4, 3)]))
    case = Case(
        batch=draw(st.integers(1, 2)),
        groups=groups,
        inputs=draw(st.integers(1, 40)),
        outputs=draw(st.integers(1, 70)),
        image=pair(1, 20),
        kernel=kernel,
        stride=pair(1, 3),
        padding=(*pair(0, 3), *pair(0, 3)),
        dilation=pair(1, 2),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
    )
    high, wide = _output(case)
    if high < 1 or wide < 1:
        reach = [(k - 1) * d + 1 for k, d in zip(case.kernel, case.dilation, strict=True)]
        case = Case(**{**vars(case), "image": (case.image[0] + reach[0], case.image[1] + reach[1])})
    return case


def graph_of_case(case: Case) -> OnnxGraph:
    """Return convolution → residual → activation."""
    rng = np.random.default_rng(5)
    shape = (case.groups * case.outputs, case.inputs, *case.kernel)
    weights = {"w": rng.standard_normal(shape) / np.sqrt(case.inputs * case.kernel[0] * case.kernel[1])}
    operands = ["x", "w"]
    if case.bias:
        weights["bias"] = rng.standard_normal(shape[0])
        operands.append("bias")
    weights["zero"], weights["six"] = np.array(0.0), np.array(6.0)
    conv = helper.make_node(
        "Conv", operands, ["c"], "conv", group=case.groups, kernel_shape=case.kernel, strides=case.stride,
        pads=case.padding, dilations=case.dilation,
    )  # fmt: skip
    result = [case.batch, case.groups * case.outputs, *_output(case)]
    inputs: dict[str, Any] = {"x": [case.batch, case.groups * case.inputs, *case.image]}
    nodes = [conv]
    last = "c"
    if case.residual:
        inputs["r"] = result
        nodes.append(helper.make_node("Add", ["c", "r"], ["a"], "residual"))
        last = "a"
    for node in ACTIVATIONS[case.activation]:
        copied = NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [last if name == "a" else name for name in node.input]
        nodes.append(copied)
    if case.activation != "none":
        last = "b"
    nodes.append(helper.make_node("Identity", [last], ["y"], "result"))
    tensors = [numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()]
    return graph_of(nodes, inputs, {"y": result}, tensors, opset=20)


def check(case: Case, cpu: str | None) -> None:
    graph = graph_of_case(case)
    rng = np.random.default_rng(6)
    feeds = {spec.name: rng.standard_normal(spec.shape).astype("float32") for spec in graph.inputs}
    (got,) = run_graph(graph, feeds, resolve_profile(mcpu=cpu))
    want = Reference(graph).run(feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("cpu", [None, "x86-64-v3", "x86-64"])
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_a_convolution_computes_what_onnx_runtime_computes(cpu: str | None, case: Case) -> None:
    check(case, cpu)


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(2, 2, 2), (3, 1, 2), (2, 1, 1), (2, 2, 8), (9, 2, 2)])
def test_groups_that_fill_no_block_read_no_lane_after_the_last_channel(groups: int, inputs: int, outputs: int) -> None:
    weight = np.ones((groups * outputs, inputs, 3, 3), "float32")
    merged, count = whole_groups(weight, groups, 16)
    if count == 1:
        assert merged.shape[:2] == (groups * outputs, groups * inputs)
    check(Case(1, groups, inputs, outputs, (5, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True, False, "relu"), None)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_many_convolutions_compute_what_onnx_runtime_computes(case: Case) -> None:
    check(case, None)


def test_a_1_by_1_convolution_may_be_followed_by_something_that_differs_by_row() -> None:
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((40, 20, 1, 1)), "rows": rng.standard_normal((9, 1))}
    tensors = [numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[1, 1]),
        helper.make_node("Add", ["c", "rows"], ["y"], "add"),
    ]
    graph = graph_of(nodes, {"x": [1, 20, 9, 3]}, {"y": [1, 40, 9, 3]}, tensors)
    feeds = {"x": rng.standard_normal((1, 20, 9, 3)).astype("float32")}
    for cpu in (None, "x86-64-v3"):
        (got,) = run_graph(graph, feeds, resolve_profile(mcpu=cpu))
        np.testing.assert_allclose(got, Reference(graph).run(feeds)["y"], rtol=1e-4, atol=2e-5)
