"""The promised architectures go from PyTorch, or from ONNX, to a bundle whose parity passed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import cnncc_runtime
from cnncc.compiler.cache import Cache
from cnncc.compiler.model_reference import ModelRequest
from cnncc.compiler.pipeline import Compiled, CompileRequest, compile
from cnncc.targets.base import KernelOptions
from cnncc.targets.devices import resolve_profile
from cnncc_runtime.bundle import PARITY, REFERENCE
from tests.zoo.factories import TORCHVISION, reference

QUICK = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "lraspp_mobilenet_v3_large",
)
"""The light half: CI compiles these."""

SHAPES = {"inception_v3": "1,3,299,299", "unet": "1,3,256,256"}
LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))


def compiled(model: ModelRequest, folder: Path) -> Compiled:
    request = CompileRequest(model, resolve_profile("host"), folder / "model.cnncc")
    return compile(request, cache=Cache(folder / "cache"))


def assert_engine_is_proven(result: Compiled) -> None:
    """Check what the bundle says of itself, and that a user's run gives finite numbers of the promised shape."""
    assert result.parity == "passed"
    report = json.loads(result.bundle.file(PARITY).read_bytes())
    judged = {subject["subject"] for subject in report["subjects"] if subject["judged"]}
    assert {"engine", "onnxruntime"} <= judged
    assert result.bundle.manifest.layers
    with cnncc_runtime.open(result.bundle) as session:
        [spec] = session.inputs
        feeds = {spec.name: np.random.default_rng(3).standard_normal(spec.shape, dtype=np.float32)}
        outputs = session.run(feeds)
        assert [list(outputs[o.name].shape) for o in session.outputs] == [list(o.shape) for o in session.outputs]
        assert all(np.isfinite(output).all() for output in outputs.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.zoo)
        for name in (*TORCHVISION, "unet")
    ],
)
def test_an_architecture_compiles_from_pytorch(name: str, tmp_path: Path) -> None:
    shape = SHAPES.get(name, "1,3,224,224")
    result = compiled(ModelRequest(reference(name), input_shapes=(shape,)), tmp_path)
    assert_engine_is_proven(result)
    report = json.loads(result.bundle.file(PARITY).read_bytes())
    assert any(subject["subject"] == "pytorch" and subject["judged"] for subject in report["subjects"])


HEAVY = ("light_vgg19", "light_bvlc_alexnet", "light_zfnet512")
"""Hundreds of megabytes of (constant) weights."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.zoo if path.stem in HEAVY else pytest.mark.slow)
        for path in LIGHT
    ],
)
def test_a_light_model_of_the_onnx_package_compiles(path: Path, tmp_path: Path) -> None:
    assert_engine_is_proven(compiled(ModelRequest(str(path)), tmp_path))


def test_the_nine_light_models_are_there() -> None:
    assert len(LIGHT) == 9


PEAK = """
import sys
from pathlib import Path
import numpy as np
import cnncc_runtime
from cnncc_runtime import tvm_runtime

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

tvm_runtime.load()
before = peak()
with cnncc_runtime.open(sys.argv[1], threads=2) as session:
    [spec] = session.inputs
    for _ in range(2):
        session.run({spec.name: np.zeros(spec.shape, "f")})
print(peak() - before)
"""


@pytest.mark.slow
def test_a_network_takes_the_memory_of_its_weights_once(tmp_path: Path) -> None:
    bundle = compiled(ModelRequest(reference("resnet18"), input_shapes=("1,3,224,224",)), tmp_path).bundle
    record = bundle.manifest.engine.weights
    assert record is not None
    weights = bundle.manifest.files[record.file].size
    assert 40 << 20 < weights < 1.02 * bundle.file(REFERENCE).stat().st_size, "transformed weights do not travel"
    assert bundle.manifest.files[bundle.manifest.engine.file].size < 2 << 20, "the engine file is code alone"
    [positions] = record.entries.values()
    taken = sum(record.tensors[position].nbytes for position in positions)
    assert weights < taken <= (1.01 + KernelOptions.growth) * weights
    done = subprocess.run([sys.executable, "-c", PEAK, str(bundle.path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.3 * taken
