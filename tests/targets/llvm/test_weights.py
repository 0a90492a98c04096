"""Weights leave the program: what goes, what stays, what the engine makes of the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import cnncc_runtime
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import BuildOptions, Engine
from cnncc.targets.devices import resolve_profile
from cnncc.targets.llvm.target import ENGINE, LlvmTarget
from cnncc.targets.llvm.weights import LEAST, WEIGHTS, Weights, write_weights
from cnncc_runtime.bundle import read_bundle, write_bundle
from cnncc_runtime.errors import RunFailed
from cnncc_runtime.weights import ALIGNMENT, MappedWeights, WeightRecord
from tests.runtime.engine_files import manifest
from tests.targets.conformance import feeds_of, graph_of

WIDTH = 300  # float32: a row is a large constant, and no multiple of the alignment


def row(seed: int, width: int = WIDTH) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, width)).astype("float32")


def chain(rows: Sequence[NDArray[Any]], batch: int | str = 1) -> OnnxGraph:
    """``((x + r0) * r1 + r2) * …``: constants that reach the engine as they are."""
    names = ["x", *(f"v{number}" for number in range(len(rows)))]
    nodes = [
        helper.make_node(("Add", "Mul")[number % 2], [names[number], f"r{number}"], [names[number + 1]])
        for number in range(len(rows))
    ]
    weights: list[onnx.TensorProto] = [numpy_helper.from_array(array, f"r{n}") for n, array in enumerate(rows)]
    width = rows[0].shape[1]
    return graph_of(nodes, {"x": [batch, width]}, {names[-1]: [batch, width]}, weights)


def of_chain(rows: Sequence[NDArray[Any]], x: NDArray[Any]) -> NDArray[Any]:
    for number, array in enumerate(rows):
        x = x * array if number % 2 else x + array
    return x


def build(graph: OnnxGraph, folder: Path, *batches: int) -> Engine:
    profile = resolve_profile()
    return LlvmTarget(profile).build(graph, BuildOptions(profile, batches), folder)


def bundled(graph: OnnxGraph, built: Engine, folder: Path, **changes: Any) -> Path:
    described = manifest(graph.inputs, graph.outputs, **{"target": built.target, "engine": built.record} | changes)
    folder.mkdir()
    write_bundle(folder, described, built.files)
    return folder


def test_large_constants_lie_in_the_file_and_small_ones_in_the_engine(tmp_path: Path) -> None:
    large, small = row(0), row(1, 1)
    graph = chain([large, small])
    engine = build(graph, tmp_path)
    assert engine.files.keys() == {ENGINE, WEIGHTS}
    assert engine.record.weights is not None
    assert engine.record.weights.entries == {0: (0,)}
    assert large.tobytes() in (tmp_path / WEIGHTS).read_bytes()
    assert large.tobytes() not in (tmp_path / ENGINE).read_bytes()


def test_a_graph_without_large_constants_has_no_such_file(tmp_path: Path) -> None:
    graph = chain([row(0, LEAST // 4 - 1)])
    engine = build(graph, tmp_path)
    assert engine.record.weights is None
    assert engine.files.keys() == {ENGINE}
    assert not (tmp_path / WEIGHTS).exists()
    feeds = feeds_of(graph)
    with cnncc_runtime.open(bundled(graph, engine, tmp_path / "b.cnncc")) as session:
        np.testing.assert_array_equal(session.run(feeds)["v0"], of_chain([row(0, LEAST // 4 - 1)], feeds["x"]))


def test_equal_constants_are_stored_once_in_one_entry_and_across_entries(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(0), row(1), row(2)]
    graph = chain(rows, "N")
    engine = build(graph, tmp_path, 1, 3)
    record = engine.record.weights
    assert record is not None
    with (tmp_path / WEIGHTS).open("rb") as file:
        stored = {array.tobytes() for array in MappedWeights(file, record)}
    assert len(record.tensors) == 3
    assert stored == {row(seed).tobytes() for seed in range(3)}
    assert {frozenset(taken) for taken in record.entries.values()} == {frozenset(range(3))}
    with cnncc_runtime.open(bundled(graph, engine, tmp_path / "b.cnncc", batches=(1, 3))) as session:
        for batch in (1, 3):
            feeds = feeds_of(graph, batch)
            np.testing.assert_allclose(session.run(feeds)["v4"], of_chain(rows, feeds["x"]), rtol=1e-6, atol=1e-6)


def test_constants_that_differ_in_shape_or_type_only_are_kept_apart(tmp_path: Path) -> None:
    nothing = np.zeros((1, LEAST), "float32")
    weights = Weights((nothing, nothing.reshape(-1), nothing.view("int32")), {"main": (2, 0, 1)})
    record = write_weights(weights, {0: "main"}, tmp_path / WEIGHTS)
    assert record is not None
    assert [(tensor.shape, tensor.dtype) for tensor in record.tensors] == [
        ((1, LEAST), "float32"),
        ((LEAST,), "float32"),
        ((1, LEAST), "int32"),
    ]
    assert record.entries == {0: (2, 0, 1)}


def test_tensors_of_every_type_are_read_back_from_aligned_places(tmp_path: Path) -> None:
    arrays = tuple(
        np.arange(1, size + 1).astype(dtype)
        for size, dtype in ((7, "int8"), (300, "float32"), (5, "bool"), (33, "float16"), (9, "int64"))
    )
    record = write_weights(Weights(arrays, {"main": tuple(range(5))}), {0: "main"}, tmp_path / WEIGHTS)
    assert record is not None
    assert all(tensor.offset % ALIGNMENT == 0 for tensor in record.tensors)
    assert not record.problem((tmp_path / WEIGHTS).stat().st_size, [0])
    with (tmp_path / WEIGHTS).open("rb") as file:
        mapped = MappedWeights(file, record)
    for array, wanted in zip(mapped, arrays, strict=True):
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


def test_constant_outputs_and_outputs_over_weights_belong_to_the_caller(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["r"], ["c"]), helper.make_node("Add", ["x", "r"], ["y"])]
    weights = [numpy_helper.from_array(row(0), "r")]
    graph = graph_of(nodes, {"x": [1, WIDTH]}, {"c": [1, WIDTH], "y": [1, WIDTH]}, weights)
    engine = build(graph, tmp_path)
    with cnncc_runtime.open(bundled(graph, engine, tmp_path / "b.cnncc")) as session:
        for _ in range(2):
            results = session.run(feeds_of(graph))
            np.testing.assert_array_equal(results["c"], row(0))
            np.testing.assert_array_equal(results["y"], feeds_of(graph)["x"] + row(0))
            results["c"][...] = -1


def smaller(tensor: WeightRecord) -> WeightRecord:
    return replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] // 2))


def flat(tensor: WeightRecord) -> WeightRecord:
    return replace(tensor, shape=(tensor.nbytes // 4,))


def whole_numbers(tensor: WeightRecord) -> WeightRecord:
    return replace(tensor, dtype="int32")


@pytest.mark.parametrize("change", [smaller, flat, whole_numbers])
def test_kernels_refuse_weights_that_are_not_what_they_were_made_for(change: Any, tmp_path: Path) -> None:
    graph = chain([row(0), row(1)])
    engine = build(graph, tmp_path)
    record = engine.record.weights
    assert record is not None
    lying = replace(record, tensors=tuple(map(change, record.tensors)))
    path = bundled(graph, engine, tmp_path / "b.cnncc", engine=replace(engine.record, weights=lying))
    assert read_bundle(path).manifest.engine.weights == lying
    with cnncc_runtime.open(path) as session, pytest.raises(RunFailed):
        session.run(feeds_of(graph))
