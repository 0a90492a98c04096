"""``cnncc bench`` on a GPU: the digits CNN beside its peers, where they are installed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cnncc.compiler.bench.bundle import BF16_AGREEMENT
from cnncc.compiler.bench.runner import AGREEMENT_LIMIT
from cnncc.compiler.bench.subjects import KINDS, find_kind
from cnncc_runtime.errors import DependencyMissing
from cnncc_runtime.gpu import host_gpus
from tests.cli.conftest import digits_network
from tests.cli.harness import DIGITS, apart

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

SHORT = ("--rounds", "4", "--min-time", "0.2", "--threads", "1", "--json")
PROBES = {
    "ort-cuda": "import onnxruntime; assert 'CUDAExecutionProvider' in onnxruntime.get_available_providers()",
    "torch-cuda": "import torch; assert torch.cuda.is_available()",
    "torch-compile-cuda": "import torch, triton; assert torch.cuda.is_available()",
}
LIMITS = {"fp32": AGREEMENT_LIMIT, "fp16": AGREEMENT_LIMIT, "bf16": BF16_AGREEMENT}


def needs(peer: str) -> None:
    """Skip a test whose peer is not installed here with a GPU to compute on."""
    try:
        kind = find_kind(peer)
    except DependencyMissing as exc:
        pytest.skip(exc.message)
    if peer in PROBES and subprocess.run([kind.python, "-c", PROBES[peer]], capture_output=True).returncode:
        pytest.skip(f"{kind.title} cannot compute on a GPU here")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    torch.manual_seed(1)
    save_file(digits_network().state_dict(), path)
    return path


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def bundle(
    request: pytest.FixtureRequest, weights: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The digits CNN for this machine's GPU, in each precision."""
    path = tmp_path_factory.mktemp("bundles") / f"{request.param}.cnncc"
    arguments = ("compile", f"{DIGITS}:build", "--weights", weights, "--target", "cuda", "--cache-dir", cache)
    widened = ("--max-fallback", "4") if request.param == "bf16" else ()  # TensorRT-RTX widens a product
    apart(*arguments, "--precision", request.param, *widened, "-o", path)
    return path


def bench(bundle: Path, cache: Path, *flags: str, code: int = 0) -> dict[str, Any]:
    return apart("bench", bundle, *SHORT, "--cache-dir", cache, *flags, code=code).document


def test_both_times_and_the_gpu_are_told(bundle: Path, cache: Path) -> None:
    report = bench(bundle, cache, "--against", "")
    [ours] = report["subjects"]
    assert 0 < ours["device"]["p50"] < ours["wall"]["p50"], "copies and the host take something"
    assert (ours["clock"], ours["precision"]) == ("CUDA events", bundle.stem)
    gpu = report["gpu"]
    assert gpu["name"] == host_gpus()[0].name
    if gpu["problem"]:
        assert gpu["problem"].startswith("its clocks were not watched")
    else:
        assert gpu["driver"]
        assert ours["gpu"]["before"]["sm_mhz"] is None or ours["gpu"]["sm_mhz"][0] > 0


@pytest.mark.parametrize("peer", ["torch-cuda", "ort-cuda", "torch-compile-cuda", "trtexec"])
def test_a_peer_is_measured_in_the_bundles_precision(peer: str, bundle: Path, cache: Path) -> None:
    needs(peer)
    if (peer, bundle.stem) == ("ort-cuda", "bf16"):
        pytest.skip("ONNX Runtime has few operators in bfloat16")
    report = bench(bundle, cache, "--against", peer)
    ours, theirs = report["subjects"]
    assert (theirs["name"], theirs["precision"]) == (peer, bundle.stem)
    assert ours["agreement"] < LIMITS[bundle.stem]
    [ratio] = report["ratios"]
    assert ratio["basis"] == ("device" if KINDS[peer].times_itself else "wall")
    assert ratio["device"]["value"] == pytest.approx(ours["device"]["p50"] / theirs["device"]["p50"], rel=0.2)
    assert theirs["device"]["p50"] > 0
    assert theirs["clock"]


def test_a_peer_on_the_cpu_is_refused(bundle: Path, cache: Path) -> None:
    outcome = apart("bench", bundle, "--against", "ort", "--cache-dir", cache, code=2)
    assert "'ort' computes on the CPU, the bundle's engine on a GPU" in outcome.stderr
    assert "ort-cuda, torch-cuda, torch-compile-cuda, trtexec" in outcome.stderr


@pytest.mark.slow
def test_an_engine_takes_no_longer_than_trtexecs_of_the_same_model(cache: Path, tmp_path: Path) -> None:
    needs("trtexec")
    bundle = tmp_path / "resnet18.cnncc"
    arguments = ("compile", "torchvision:resnet18", "--input-shape", "1,3,224,224", "--target", "cuda")
    apart(*arguments, "--cache-dir", cache, "-o", bundle)
    apart("bench", bundle, "--max-latency-ratio", "trtexec=1.02", "--against", "", "--cache-dir", cache)
