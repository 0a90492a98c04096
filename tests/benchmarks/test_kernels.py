"""Operations of kernels and of networks."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.kernels import Kernel, Times, operations_of, table
from cnncc.compiler.inspection import summarize
from cnncc.graph.onnx_graph import OnnxGraph

DIRECT = Kernel("direct", "conv2d", (("float32", (1, 8, 4, 4)),), ((0,), (3,)))
INPUT = Kernel("winograd_input", "loops", (("float32", (1, 8, 4, 4)),), ((1,),))
PRODUCT = Kernel("winograd_product", "matmul", (("float32", (36, 8, 8)), ("int64", (2,))), ((1, 2),))
KERNELS = (DIRECT, INPUT, PRODUCT)
TIMES = Times(
    {"direct": 2e-6, "winograd_input": 1e-6, "winograd_product": 5e-6},
    {"direct": 5e-6, "winograd_input": 1e-6, "winograd_product": 5e-6},
    12.1e-6,
)
MACS = (1000, 4000, 0, 3000)


def test_operations_of_a_node_that_takes_several_kernels_go_to_the_slowest() -> None:
    assert operations_of(KERNELS, TIMES, MACS) == {
        "direct": 2 * (1000 + 3000) / 2,
        "winograd_input": 0,
        "winograd_product": 2 * 4000,
    }


def test_the_bytes_of_a_kernel_are_those_of_its_tensors() -> None:
    assert PRODUCT.bytes == 36 * 8 * 8 * 4 + 2 * 8


def test_the_table_sums_calls_and_compares_them_with_the_network() -> None:
    text = "\n".join(table("net", KERNELS, TIMES, MACS, {"fp32": 1e10}, 1, {"winograd_product": 0.914}))
    assert "net, 1 thread, peak 10 GFLOP/s" in text
    assert "kernels 0.010 ms alone, 0.011 ms inside the network (+10.0 %), network 0.012 ms (+10.0 %)" in text
    assert "1.3 GFLOP/s, 13 % of the peak" in text
    first = text.splitlines()[2]
    assert first.split()[:3] == ["winograd_product", "matmul", "1"]
    assert re.search(r"1\.6 GFLOP/s +16 +91  36×8×8", first), "measured, and what the inner loop is predicted to do"
    [moves] = [line for line in text.splitlines() if "winograd_input" in line]
    assert "0.5 GB/s" in moves
    assert moves.endswith("1×8×4×4")


def test_what_multiplies_int8_is_held_to_the_integer_peak_and_what_multiplies_floats_is_not() -> None:
    kernels = (replace(DIRECT, rule="int8", precision="int8"), INPUT, PRODUCT)
    text = "\n".join(table("net", kernels, TIMES, MACS, {"int8": 4e10, "fp32": 1e10}, 1, {}))
    assert "net, 1 thread, peak 40 GOP/s, of fp32 10 GFLOP/s" in text
    [integer] = [line for line in text.splitlines() if "direct" in line]
    assert re.search(r"2\.0 GOP/s +5  ", integer)  # 4000 operations in 2 µs, of 40 GOP/s
    [floating] = [line for line in text.splitlines() if "winograd_product" in line]
    assert re.search(r"1\.6 GFLOP/s +16  ", floating)
    assert "1.3 GOP/s, 3 % of the peak" in text


@pytest.mark.parametrize(
    ("op", "attributes", "image", "weight", "result", "macs"),
    [
        ("Conv", {"pads": [1, 1, 1, 1]}, [1, 3, 8, 8], [16, 3, 3, 3], [1, 16, 8, 8], 8 * 8 * 16 * 3 * 9),
        ("Conv", {"group": 16, "strides": [2, 2], "pads": [1, 1, 1, 1]}, [2, 16, 8, 8], [16, 1, 3, 3], [2, 16, 4, 4],
         2 * 16 * 4 * 4 * 9),
        ("ConvTranspose", {"strides": [2, 2]}, [1, 8, 4, 4], [8, 5, 2, 2], [1, 5, 8, 8], 8 * 4 * 4 * 5 * 4),
        ("Gemm", {"transB": 1}, [1, 128], [10, 128], [1, 10], 1280),
        ("MatMul", {}, [1, 7, 64], [64, 32], [1, 7, 32], 7 * 64 * 32),
    ],
)  # fmt: skip
def test_multiply_adds_are_counted_from_the_graph(
    op: str, attributes: dict[str, object], image: list[int], weight: list[int], result: list[int], macs: int
) -> None:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(np.zeros(weight, np.float32), "w")],
    )
    summary = summarize(OnnxGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])))
    assert summary.macs == macs
