"""``cnncc-run`` runs what ``cnncc compile`` makes for this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cnncc.graph.reader import read_onnx
from cnncc.graph.reference import Reference
from cnncc_runtime.bundle import REFERENCE, read_bundle
from cnncc_runtime.cpu import host_machine
from tests.cli.harness import DIGITS, apart
from tests.runtime.c_runner import Runner, host_runner, small_runner

pytestmark = pytest.mark.slow

PRECISIONS = {"fp32": (), "int8": ("--precision", "int8", "--data", "random", "--allow-slow")}


@pytest.fixture(scope="module", params=["wheels", "compiled"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("runner")
    return small_runner(folder, host_machine()) if request.param == "compiled" else host_runner(folder)


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    made = tmp_path_factory.mktemp("c") / f"{request.param}.cnncc"
    model = (f"{DIGITS}:build", "--weights", weights, "--input-shape", "N,3,28,28", "--batch", "1,4")
    apart("compile", *model, *PRECISIONS[request.param], "-o", made)
    return made


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_an_engine_computes_what_onnx_runtime_computes(
    runner: Runner, bundle: Path, tmp_path: Path, batch: int, threads: str
) -> None:
    record = read_bundle(bundle).manifest.engine.weights
    assert record is not None
    if bundle.stem == "fp32":
        assert any(tensor.expansion for tensor in record.tensors), "weights that are stored smaller must be among them"
    x = np.random.default_rng(batch).random((batch, 3, 28, 28), np.float32)
    np.save(tmp_path / "x.npy", x)
    flags = ("--verify", "--bench", "0.1", "--profile", "--threads", threads, "--json")
    told = runner(bundle, "--input", tmp_path / "x.npy", "--output", tmp_path / "out", *flags).document
    assert told["verify"] == {"problems": [], "passed": True}
    assert told["bench"]["batch"] == batch
    assert told["bench"]["input"] == "the input"
    if batch == 1:  # whose kernels the manifest lists
        kernels = {layer.kernel for layer in read_bundle(bundle).manifest.layers}
        assert kernels <= {call["kernel"] for call in told["profile"]}
    found = np.load(tmp_path / "out" / told["outputs"][0]["file"])
    [wanted] = Reference(read_onnx(bundle / REFERENCE)).run({"image": x}).values()
    tolerance = 1e-5 if bundle.stem == "fp32" else 2e-2
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)
