"""Weights beside a stripped engine: by which names, and that TensorRT's parser knows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.cuda.parse import parse
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc.targets.cuda.weights import WEIGHTS, write_weights
from cnncc_runtime.gpu import host_gpus
from tests.calibration import patterns
from tests.calibration.rtx import VERSION, tensorrt_rtx
from tests.conftest import ROOT
from tests.targets.conformance import graph_of, small_graph

RTX = Chosen(VENDORS[-1], VERSION)


def test_the_file_holds_each_weight_by_its_name(tmp_path: Path) -> None:
    graph = small_graph()
    write_weights(graph, tmp_path / WEIGHTS)
    with np.load(tmp_path / WEIGHTS, allow_pickle=False) as archive:
        assert set(archive.files) == set(graph.constants)
        for name in archive.files:
            np.testing.assert_array_equal(archive[name], graph.constant(name))
    write_weights(graph, tmp_path / "again.npz")
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_types_that_numpy_lacks_are_their_bits(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    half = helper.make_tensor("w/a.b", TensorProto.BFLOAT16, [3], bits.tobytes(), raw=True)
    scalar = numpy_helper.from_array(np.float16(2.0), "s")
    node = helper.make_node("Add", ["x", "w/a.b"], ["y"], "add")
    write_weights(graph_of([node], {"x": (16, [3])}, {"y": (16, [3])}, [half, scalar]), tmp_path / WEIGHTS)
    with np.load(tmp_path / WEIGHTS, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["w/a.b"], bits)
        assert archive["s"].shape == () and archive["s"].dtype == np.float16


QDQ = next(pattern.graph() for pattern in patterns.PATTERNS if pattern.rtx == "int8")


@pytest.mark.parametrize("graph", [small_graph(), QDQ], ids=["float", "int8"])
def test_the_parser_names_weights_as_the_graph_does(graph: OnnxGraph) -> None:
    """What a refitter calls weights is what the network calls them, and the network says whether it knows a name."""
    parsed = parse(graph, tensorrt_rtx(), RTX)
    weights = {name for name, tensor in graph.constants.items() if len(tensor.dims) > 1}
    assert weights
    assert {name for name in weights if parsed.network.mark_weights_refittable(name)} == weights
    assert not parsed.network.mark_weights_refittable("of nobody")


REFIT = """
from pathlib import Path
from cnncc.targets.base import BuildOptions, GpuOptions
from cnncc.targets.cuda.compile import compile_graph
from cnncc.targets.cuda.vendors import VENDORS, Chosen
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.errors import BuildFailed
from tests.targets.conformance import small_graph
options = BuildOptions(resolve_profile("sm89"), gpu=GpuOptions(strip_weights=True))
try:
    compile_graph(small_graph(), (), "8.9", Chosen(VENDORS[-1], "{version}"), options, Path("never.plan"))
except BuildFailed as exc:
    print(exc)
"""


@pytest.mark.skipif(bool(host_gpus()), reason="about machines without a GPU")
def test_tensorrt_rtx_cannot_build_refittable_engines_without_a_driver() -> None:
    """Its documentation says that it can. Where it does one day, `check_options` need not refuse it."""
    tensorrt_rtx()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    script = [sys.executable, "-c", REFIT.format(version=VERSION)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    assert "CHECK(status == CUDA_SUCCESS) failed" in done.stdout
