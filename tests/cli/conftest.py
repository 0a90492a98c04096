"""The digits CNN, compiled once for all tests of the command line, and a toolchain that builds wrong engines."""

from __future__ import annotations

import os
import runpy
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from tests.cli.harness import DIGITS, apart

WriteModule = Callable[..., Path]


@dataclass(frozen=True)
class Digits:
    """The seed CNN, compiled; tests read it and copy what they change.

    Attributes:
        model: MODEL, as the command line takes it.
        weights: Seeded random weights.
        bundle: The compiled bundle.
        stderr: What the compile said.
    """

    model: str
    weights: Path
    bundle: Path
    stderr: str

    @property
    def module(self) -> nn.Module:
        """The network in PyTorch."""
        network = digits_network()
        network.load_state_dict(load_file(self.weights))
        return network.eval()

    def expected(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what PyTorch says."""
        with torch.no_grad():
            found: NDArray[np.float32] = self.module(torch.tensor(x)).numpy()
        return found


def digits_network() -> nn.Module:
    """Build the network from the example's own file."""
    network: nn.Module = runpy.run_path(str(DIGITS))["build"]()
    return network


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights of the digits CNN."""
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_file(digits_network().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, weights: Path, _own_cache: None) -> Digits:
    """The digits CNN, compiled by the command line with the tests' shared cache."""
    bundle = tmp_path_factory.mktemp("digits") / "digits.cnncc"
    outcome = apart("compile", f"{DIGITS}:build", "--weights", weights, "-o", bundle)
    return Digits(f"{DIGITS}:build", weights, bundle, outcome.stderr)


@pytest.fixture(scope="session")
def digit_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with labels: ``train.npz`` and ``held.npz``."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    x = np.repeat(found.images[:, None].repeat(3, 2).repeat(3, 3), 3, 1)[:, :, :24, :24].astype(np.float32) / 8 - 1
    x = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1.0)
    order = np.random.default_rng(0).permutation(len(x))
    for name, rows in (("train", order[:400]), ("held", order[1437:])):
        np.savez(folder / f"{name}.npz", x=x[rows], y=found.target[rows])
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small grey picture."""
    from PIL import Image

    path = tmp_path / "digit.png"
    Image.fromarray((np.arange(64).reshape(8, 8) * 4).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def write_module(tmp_path: Path) -> WriteModule:
    """A function that writes a Python file of a model (torch and nn are imported) and returns its path."""

    def write(source: str, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(source), encoding="utf-8")
        return path

    return write


WRONG_TARGET = '''
"""A target whose compiler is broken: it alters one weight tensor. Otherwise it is the llvm target."""

from dataclasses import replace

from onnx import numpy_helper

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.llvm.target import LlvmTarget


class WrongTarget:
    name = "wrong"

    def __init__(self, profile):
        self.profile = profile
        self._real = LlvmTarget(profile)

    def probe(self):
        return self._real.probe()

    def toolchain(self):
        return self._real.toolchain()

    def unsupported(self, graph):
        return self._real.unsupported(graph)

    def build(self, graph, options, workdir):
        proto = graph.copy_proto()
        [_, second] = [node for node in proto.graph.node if node.op_type == "Conv"]
        [weight] = [tensor for tensor in proto.graph.initializer if tensor.name == second.input[1]]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.001, weight.name))
        engine = self._real.build(OnnxGraph(proto), options, workdir)
        return replace(engine, target=replace(engine.target, name=self.name))
'''


def install_target(site: Path, name: str, source: str, attribute: str) -> None:
    """Lay out a distribution that offers a target by its entry point, as pip would install it."""
    info = site / f"{name}_target-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}_target.py").write_text(source, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cnncc.targets]\n{name} = {name}_target:{attribute}\n")


@pytest.fixture
def wrong_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install the broken target for this process and its children; returns its name."""
    install_target(tmp_path / "site", "wrong", WRONG_TARGET, "WrongTarget")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    return "wrong"
