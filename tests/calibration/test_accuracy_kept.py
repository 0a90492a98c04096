"""What int8 keeps of trained networks, beside ONNX Runtime's quantizer: benchmarks/accuracy.py in small.

Trained here on scikit-learn's digits, a seed each; the margins are looser than what the benchmark reaches over three.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.trained import nets
from benchmarks.trained.data import Data, digits
from benchmarks.trained.training import folded, train, uneven
from cnncc.calibration.accuracy import Accuracy, Validation
from cnncc.calibration.calibrate import Job, calibrate
from cnncc.calibration.data import open_data
from cnncc.calibration.quantize import quantize
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import clean_graph
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import bind_batch, read_onnx, with_shapes
from cnncc.graph.reference import Reference
from tests.targets.llvm.running import operands_of, run_graph

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "benchmarks" / "quantizers" / "ort_worker.py"
PEERS = {"minmax": ("MinMax", "--lean"), "percentile": ("Percentile", "--lean")}
"""ONNX Runtime's best on these networks of what TensorRT takes: s8, symmetric, per channel, float biases."""


def learnt(network: nn.Module, data: Data) -> nn.Module:
    train(network, data.train, epochs=12, rate=4e-3, batch=64, seed=0, tell=lambda line: None)
    return network


def hard(data: Data) -> nn.Module:
    """MobileNetV2 whose channels differ a hundredfold, the function unchanged."""
    network = learnt(nets.mbv2_relu(), data)
    assert isinstance(network, nets.MobileNet)
    network = folded(network)
    uneven(network, seed=0)
    return network


NETWORKS: dict[str, Callable[[Data], nn.Module]] = {
    "resnet": lambda data: learnt(nets.resnet(), data),
    "mbv2": lambda data: learnt(nets.mbv2(), data),
    "mbv2h": hard,
    "effnet": lambda data: learnt(nets.effnet(), data),
}


@dataclass(frozen=True)
class Trained:
    """A trained network and what to judge it with."""

    name: str
    graph: OnnxGraph
    calibration: Path
    test: Path
    validation: Validation
    quantized: OnnxGraph


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(NETWORKS[request.param](data).state_dict(), folder / "w.safetensors")
    model = ModelRequest(f"{nets.__file__}:{request.param}", folder / "w.safetensors", ("N,3,28,28",))
    graph = clean_graph(model)
    np.savez(folder / "calib.npz", x=data.calibration(256, 0))
    np.savez(folder / "test.npz", x=data.test.inputs, y=data.test.y)
    validation = Validation(graph, open_data(str(folder / "test.npz"), graph.inputs, None, limit=None))
    stream = open_data(str(folder / "calib.npz"), graph.inputs, None, limit=None)
    table = calibrate(Job(graph=graph, name=request.param, version="test", stream=stream, workers=2))
    assert not table.kept
    quantized = with_shapes(quantize(graph, table, name=request.param))
    return Trained(request.param, graph, folder / "calib.npz", folder / "test.npz", validation, quantized)


def theirs(network: Trained, options: tuple[str, ...], folder: Path) -> Accuracy:
    (folder / "fp32.onnx").write_bytes(network.graph.serialized)
    arguments = [folder / "fp32.onnx", network.calibration, folder / "int8.onnx", *options]
    subprocess.run([sys.executable, WORKER, *map(str, arguments)], check=True, capture_output=True)
    return network.validation.measure(read_onnx(folder / "int8.onnx"))


def test_accuracy_is_kept_and_the_noise_is_less_than_onnx_runtimes(network: Trained, tmp_path: Path) -> None:
    model, found = network.validation.measure(), network.validation.measure(network.quantized)
    assert model.metric == "top-1"
    assert model.value > 90
    assert model.value - found.value < 0.7  # two of 360 images
    peers = {name: theirs(network, options, tmp_path).sqnr_db for name, options in PEERS.items()}
    assert found.sqnr_db > max(peers.values()) + 0.5, peers
    if network.name == "mbv2h":
        assert found.sqnr_db > 20
        assert max(peers.values()) < 10


def test_an_engine_predicts_what_the_quantized_graph_predicts(network: Trained) -> None:
    with np.load(network.test) as held:
        x = held["x"]
    graph = bind_batch(network.quantized, len(x))
    feeds = {graph.inputs[0].name: x}
    (got,) = run_graph(graph, feeds)
    want = next(iter(Reference(graph).run(feeds).values()))
    noise = np.abs(got - want).max()
    first, second = np.sort(want, axis=1)[:, :-3:-1].T
    clear = first - second > 2 * noise  # the others are ties, as far as rounding next to a half goes
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(got.argmax(1)[clear], want.argmax(1)[clear])
    assert operands_of(graph) >= {"int8"}
