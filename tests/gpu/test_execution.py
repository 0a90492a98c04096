"""Engines on the GPU: what they compute, however they are launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cnncc_runtime
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.gpu import HostGpu
from cnncc_runtime.plan_session import PlanSession
from tests.cli.harness import call
from tests.gpu.conftest import Compile

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
EXECUTED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


def feeds(batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return {"image": np.random.default_rng(seed).random((batch, 3, 28, 28), np.float32)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_compile_here_proves_the_engine(compiled: Compile, precision: str) -> None:
    manifest = read_bundle(compiled(precision)).manifest
    assert manifest.parity == "passed"
    products = {layer.precision for layer in manifest.layers if {"Conv", "Gemm"} & set(layer.ops)}
    assert products == {EXECUTED[precision]}
    call("verify", compiled(precision))


def test_layers_are_compared_one_by_one(compiled: Compile) -> None:
    outcome = call("verify", compiled("fp32"), "--layers", "--json")
    assert len(outcome.document["layers"]) > 5
    assert all(layer["within"] for layer in outcome.document["layers"])


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_architectures(gpu: HostGpu, architecture: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    bundle = tmp_path / "m.cnncc"
    call("compile", f"torchvision:{architecture}", "--target", "cuda", "--precision", precision, "-o", bundle)
    assert read_bundle(bundle).manifest.parity == "passed"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_batches_in_any_order_give_what_single_images_give(compiled: Compile, precision: str, cuda_graph: bool) -> None:
    path = compiled(precision, "--input-shape", "N,3,28,28", "--batch", "4,1,8")
    whole = feeds(8)["image"]
    with cnncc_runtime.open(path, cuda_graph=cuda_graph) as session:
        name = session.outputs[0].name
        single = np.concatenate([session.run({"image": whole[i : i + 1]})[name] for i in range(8)])
        for batch in (8, 4, 1, 4, 8, 8, 4):
            found = session.run({"image": whole[:batch]})[name]
            error = np.linalg.norm(found - single[:batch]) / np.linalg.norm(single[:batch])
            # tactics may differ by batch size, and round otherwise
            assert error < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2, "int8": 5e-2}[precision]


def test_a_cuda_graph_computes_the_same(compiled: Compile) -> None:
    given = [feeds(seed=seed) for seed in range(5)]
    with cnncc_runtime.open(compiled("fp32")) as plain, cnncc_runtime.open(compiled("fp32"), cuda_graph=True) as graph:
        for each in given:
            for name, value in plain.run(each).items():
                np.testing.assert_allclose(graph.run(each)[name], value, rtol=1e-6, atol=1e-7)


def test_times_are_of_the_gpu(compiled: Compile) -> None:
    with cnncc_runtime.open(compiled("fp32")) as session:
        assert isinstance(session, PlanSession)
        times = session.device_times(feeds(), 20)
        assert len(times) == 20
        assert all(1e-6 < time < 1 for time in times)
        kernels = session.profile(feeds(), 5)
        assert len(kernels) > 1
        assert 1e-6 < sum(time for _, time in kernels) < 1


def test_a_session_lives_beside_torch(compiled: Compile) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch was built without CUDA")
    values = torch.arange(1000, device="cuda", dtype=torch.float32)
    with cnncc_runtime.open(compiled("fp32"), cuda_graph=True) as session:
        first = session.run(feeds())
        assert float(values.sum()) == 499500
        for name, value in session.run(feeds()).items():
            np.testing.assert_array_equal(first[name], value)
    assert float(values.sum()) == 499500
