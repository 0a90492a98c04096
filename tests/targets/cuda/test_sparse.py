"""Which layers are 2:4 sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.cuda.sparse import is_sparse, tell_sparse
from cnncc_runtime.errors import UsageError
from tests.calibration.qdq_builder import QdqBuilder
from tests.targets.conformance import graph_of


def dense(*shape: int) -> NDArray[Any]:
    return np.ones(shape, np.float32)


def pruned(*shape: int) -> NDArray[Any]:
    """Return weights (outputs, inputs, …) that are zero in two of every four inputs."""
    weights = dense(*shape)
    weights[:, 1::4] = weights[:, 2::4] = 0
    return weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (pruned(8, 16, 3, 3), True),
        (pruned(8, 16), True),
        (np.zeros((8, 16), np.float32), True),
        (dense(8, 16, 3, 3), False),
        (pruned(8, 6), False),  # channels do not come in fours
        (np.moveaxis(pruned(16, 8, 3, 3), 0, 1)[:, :, 0], False),  # sparse along the outputs
    ],
)
def test_two_of_every_four_input_channels(weights: NDArray[Any], expected: bool) -> None:
    assert is_sparse(weights) is expected


def test_one_weight_too_many_is_found() -> None:
    weights = pruned(8, 16, 3, 3)
    weights[7, 13, 2, 2] = 1e-6
    assert not is_sparse(weights)


def network(conv: NDArray[Any], gemm: NDArray[Any], matmul: NDArray[Any]) -> OnnxGraph:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv"),
        helper.make_node("Flatten", ["c"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["g"], "gemm", transB=1),
        helper.make_node("MatMul", ["g", "w3"], ["m"], "matmul"),
        helper.make_node("MatMul", ["m", "x2"], ["y"], "no weights"),
    ]
    weights = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate((conv, gemm, matmul), 1)]
    return graph_of(nodes, {"x": [1, 16, 1, 1], "x2": [4, 4]}, {"y": [1, 4]}, weights)


def test_layers_are_counted_along_their_inputs() -> None:
    notes: list[str] = []
    tell_sparse(network(pruned(8, 16, 1, 1), pruned(8, 8), pruned(4, 8).T.copy()), notes.append)
    tell_sparse(network(dense(8, 16, 1, 1), dense(8, 8), pruned(4, 8).T.copy()), notes.append)
    assert notes == [f"{count} of 4 convolutions and products have 2:4 sparse weights" for count in (3, 1)]


def test_dense_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer of 4 has 2:4 sparse weights along its input channels"):
        tell_sparse(network(dense(8, 16, 1, 1), dense(8, 8), dense(8, 4)), [].append)


def test_quantized_weights_are_seen_through_their_q_dq() -> None:
    notes: list[str] = []
    builder = QdqBuilder(20)
    y = builder.conv(builder.input("x", 1, 16, 8, 8), builder.weight(16, 16, 3, 3), 16, "conv")
    graph = builder.graph(y)
    proto = graph.copy_proto()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            tensor.CopyFrom(
                numpy_helper.from_array((array * (pruned(*array.shape) != 0)).astype(array.dtype), tensor.name)
            )
    tell_sparse(OnnxGraph(proto), notes.append)
    assert notes == ["1 of 1 convolutions and products have 2:4 sparse weights"]
