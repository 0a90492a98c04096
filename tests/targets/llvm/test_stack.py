"""Small buffers stay on the stack; one that is read through a view shares its memory with nothing."""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi
from onnx import helper, numpy_helper
from tvm import te, tirx

from cnncc.graph.reference import Reference
from cnncc.targets.llvm.codegen import kernel_passes
from cnncc.targets.llvm.schedule import tir
from tests.targets.conformance import graph_of
from tests.targets.llvm.running import kernels_of, run_graph


def annotations_of(elements: int, scope: str) -> list[bool]:
    """Return, for each allocation of a kernel that uses a buffer in a parallel loop, whether it stays as it is."""
    source = te.placeholder((64,), name="source")
    like = te.create_prim_func([source, te.compute((64,), lambda i: source[i])])
    read, write = like.params
    held = tir.buffer([elements], "held", scope=scope)

    def task(number: object) -> object:
        fill = tir.loop(elements, lambda i: tir.store(held, [i], read[number]))
        take = tir.store(write, [number], held[number % elements])
        return tir.block(tir.sequence([fill, take]), [held])

    module = tvm.IRModule({"main": tir.function(like, tir.parallel(64, task))})
    for name, step in kernel_passes():
        if name == "unroll":
            break
        module = step(module)
    found: list[bool] = []
    stays = "disable_lower_builtin"
    tvm_ffi.structural_walk(
        module["main"].body, [(tirx.AllocBuffer, lambda node: found.append(stays in node.annotations))]
    )
    return found


def test_a_small_local_buffer_stays() -> None:
    assert annotations_of(32, "local") == [True]


def test_a_large_buffer_and_a_shared_one_come_from_the_pool() -> None:
    assert annotations_of(4096, "local") == [False]
    assert annotations_of(32, "global") == [False]


def test_a_buffer_that_is_read_through_a_view_is_not_overwritten() -> None:
    """A transpose between two nests: the second wrote over what it read."""
    constants = {
        "scale": np.float32(0.05), "zero": np.int8(0), "split": np.array([1, 2, 8, 4, 4]),
        "whole": np.array([1, 16, 4, 4]),
    }  # fmt: skip

    def pair(source: str, target: str) -> list[object]:
        return [
            helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{target}_q"], f"{target}_quantize"),
            helper.make_node("DequantizeLinear", [f"{target}_q", "scale", "zero"], [target], f"{target}_dequantize"),
        ]

    nodes = [
        helper.make_node("Reshape", ["x", "split"], ["a"], "split"),
        *pair("a", "b"),
        helper.make_node("Transpose", ["b"], ["c"], "turn", perm=[0, 2, 1, 3, 4]),
        *pair("c", "d"),
        helper.make_node("Reshape", ["d", "whole"], ["y"], "join"),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = graph_of(nodes, {"x": [1, 16, 4, 4]}, {"y": [1, 16, 4, 4]}, tensors, opset=20)
    assert len(kernels_of(graph)) == 1, "one kernel computes all, with buffers of its own"
    x = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    (got,) = run_graph(graph, {"x": x})
    np.testing.assert_allclose(got, Reference(graph).run({"x": x})["y"], rtol=0, atol=1e-6)
