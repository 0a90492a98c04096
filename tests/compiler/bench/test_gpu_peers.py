"""Peers on GPUs, as far as a machine without one can try them: refusals, fallbacks, and what trtexec writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cnncc.compiler.bench import trtexec
from cnncc.compiler.bench.gpu_adapters import OnnxRuntimeCudaAdapter, TorchCudaAdapter, open_without_fallback
from cnncc.compiler.bench.runner import run_benchmark
from cnncc.compiler.bench.subjects import Subject
from cnncc.compiler.bench.trtexec import parse_outputs, parse_times, parse_version
from cnncc_runtime.errors import ModelRefused, RunFailed, TargetUnavailable
from cnncc_runtime.gpu import host_gpus
from cnncc_runtime.specs import TensorSpec
from tests.stand_in import install_trtexec
from tests.targets.conformance import feeds_of, small_graph

HERE = Path(__file__).parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(small_graph().serialized)
    return path


class TestOnnxRuntime:
    def test_a_model_that_it_would_compute_on_the_cpu_is_refused(self, model: Path) -> None:
        """Azure's provider computes no operator of it: all of them fall back, as some would beside CUDA's."""
        assert "AzureExecutionProvider" in onnxruntime.get_available_providers()
        with pytest.raises(ModelRefused, match="a part of the model on the CPU, with AzureExecutionProvider asked for"):
            open_without_fallback(model, "AzureExecutionProvider", {}, 1)

    def test_a_provider_that_is_not_there_is_no_cpu_in_disguise(self, model: Path) -> None:
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has CUDA")
        with pytest.raises(ModelRefused, match="on the CPU, with CUDAExecutionProvider asked for"):
            open_without_fallback(model, "CUDAExecutionProvider", {"device_id": 0, "use_tf32": 0}, 1)
        with pytest.raises(TargetUnavailable, match="is built without CUDA") as caught:
            OnnxRuntimeCudaAdapter({"gpu": "0"}).load()
        assert "CNNCC_BENCH_PYTHON_ORT_CUDA" in caught.value.hint

    def test_a_file_that_is_no_model_is_not_called_a_fallback(self, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"no model")
        with pytest.raises(Exception, match=r"bad\.onnx") as caught:
            open_without_fallback(tmp_path / "bad.onnx", "AzureExecutionProvider", {}, 1)
        assert not isinstance(caught.value, ModelRefused)


@pytest.mark.skipif(bool(host_gpus()), reason="this is about PyTorch without a GPU")
def test_pytorch_that_finds_no_gpu_is_refused() -> None:
    with pytest.raises(TargetUnavailable, match="finds no GPU") as caught:
        TorchCudaAdapter({}).load()
    assert "CNNCC_BENCH_PYTHON_TORCH_CUDA" in caught.value.hint


class Event:
    """A CUDA event by the host's clock."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Network(torch.nn.Module):
    """A convolution with an input beside the image, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, image: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.conv(image))
        return {"sum": hidden.mean((2, 3)), "steps": steps + 1}


class TestPyTorch:
    """The adapter on the CPU: its GPU is stood in for, all else is PyTorch's own."""

    @pytest.fixture
    def adapter_of(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TorchCudaAdapter]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (
            products.allow_tf32,
            cudnn.allow_tf32,
            cudnn.benchmark,
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )
        products.allow_tf32 = cudnn.allow_tf32 = True

        def make(**options: str) -> TorchCudaAdapter:
            adapter = TorchCudaAdapter(options)
            assert adapter._device == "cuda:0"
            adapter._device = "cpu"
            return adapter

        yield make
        products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, grad, threads = before
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)

    @pytest.mark.parametrize(("precision", "error"), [("", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
    def test_computes_what_the_module_computes_in_the_type_that_is_asked(
        self, adapter_of: Callable[..., TorchCudaAdapter], precision: str, error: float, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        network = Network().eval()
        image, steps = torch.randn(2, 3, 8, 8), torch.arange(3)
        torch.export.save(torch.export.export(network, (image, steps)), tmp_path / "m.pt2")
        adapter = adapter_of(precision=precision)
        assert adapter.load() == torch.__version__
        expected = network(image, steps)
        adapter.open(tmp_path / "m.pt2", 1)
        adapter.bind(["image", "steps"], [image.numpy(), steps.numpy()])
        found, counted = adapter.outputs()
        times = adapter.device_times(3)
        assert (found.dtype, counted.tolist()) == (np.float32, [1, 2, 3])
        wanted = expected["sum"].detach().numpy()
        distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert distance < error
        assert (distance > 1e-5) == bool(precision), "it computes in the type that it says"
        assert len(times) == 3
        assert adapter.note in ("", "channels last")
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


# As sampleReporting.cpp writes them: an object per inference, with the marks of both clocks, in milliseconds.
TIMES = """[
  { "startEnqMs" : 201.2, "endEnqMs" : 201.3, "startH2dMs" : 201.1, "endH2dMs" : 201.2, "startComputeMs" : 201.25,
    "endComputeMs" : 202.06, "startD2hMs" : 202.06, "endD2hMs" : 202.2, "h2dMs" : 0.1, "computeMs" : 0.81,
    "d2hMs" : 0.14, "latencyMs" : 1.05, "endToEndMs" : 1.1 }
, { "h2dMs" : 0.1, "computeMs" : 0.83, "d2hMs" : 0.14, "latencyMs" : 1.07, "endToEndMs" : 1.1 }
]
"""


class TestTrtexecsFiles:
    def test_times_are_with_copies_and_without(self) -> None:
        found = parse_times(TIMES)
        assert found.latency == pytest.approx((1.05e-3, 1.07e-3))
        assert found.compute == pytest.approx((0.81e-3, 0.83e-3))

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '[{"computeMs": 1}]', '[{"computeMs": 1, "latencyMs": null}]', "[1]"]
    )
    def test_times_that_are_none_are_an_error(self, text: str) -> None:
        with pytest.raises(RunFailed, match="trtexec"):
            parse_times(text)

    def test_outputs_come_in_the_models_order(self) -> None:
        text = """[
  { "name" : "b"
  , "dimensions" : "1x2"
  , "values" : [ 1.5, -2 ]
  }
, { "name" : "a"
  , "dimensions" : "3"
  , "values" : [ 1, 2, 3 ]
  }
]"""
        first, second = parse_outputs(text, (TensorSpec("a", (3,), "int64"), TensorSpec("b", (1, 2))))
        assert (first.dtype, first.tolist()) == (np.int64, [1, 2, 3])
        assert (second.dtype, second.tolist()) == (np.float32, [[1.5, -2.0]])
        with pytest.raises(RunFailed, match="cannot be read"):
            parse_outputs(text, (TensorSpec("c", (1,)),))

    @pytest.mark.parametrize(
        ("banner", "version"),
        [
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b11] # trtexec --help", "10.16.1"),
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v110400] # trtexec --help", "11.4.0"),
            ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --help", "8.6.1"),
            ("usage", ""),
        ],
    )
    def test_its_banner_says_the_version(self, banner: str, version: str) -> None:
        assert parse_version(banner) == version


# Takes and writes what trtexec does, and computes with ONNX Runtime on the CPU; an inference takes 2 ms, 1.5 of them
# on its GPU. Each call is noted in `calls`, beside it.
@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in on the PATH and return the file of its calls."""
    folder = tmp_path / "bin"
    calls = install_trtexec(folder)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("cnncc.compiler.bench.runner.WARM_UP_S", 0.01)
    return calls


class TestTrtexec:
    @pytest.mark.parametrize(("batch", "shapes"), [(1, None), ("N", "x:4x3x16x18")])
    def test_is_measured_beside_others_by_its_own_clock(
        self, batch: int | str, shapes: str | None, calls: Path, tmp_path: Path
    ) -> None:
        graph = small_graph(batch)
        path = tmp_path / "m.onnx"
        path.write_bytes(graph.serialized)
        subjects = [Subject("ort", "ort", path), Subject("trtexec", "trtexec", path, options={"gpu": "1"})]
        report = run_benchmark(subjects, feeds=feeds_of(graph, 4), rounds=3, min_time=0.02)
        found = report.subject("trtexec")
        assert found is not None
        assert found.device is not None
        assert (found.wall.p50, found.device.p50, found.overhead) == pytest.approx((2e-3, 1.5e-3, 0.5e-3))
        assert (found.version, found.clock, found.settled) == ("10.16.1", "its own clock", True)
        assert found.agreement == pytest.approx(0, abs=1e-6)
        said = [json.loads(line) for line in calls.read_text().splitlines()]
        [built] = [call for call in said if "onnx" in call]
        assert {"stronglyTyped", "noTF32", "skipInference"} <= set(built)
        assert {call["device"] for call in said if "help" not in call} == {"1"}
        [timed] = {tuple(sorted(call)) for call in said if "exportTimes" in call}
        assert {"noCudaGraph", "iterations", "duration"} <= set(timed)
        assert "useSpinWait" not in timed, "this version does not know it"
        assert {call.get("shapes") for call in said if "loadEngine" in call} == {shapes}
        assert {built.get(f"{which}Shapes") for which in ("min", "opt", "max")} == {shapes}

    def test_that_fails_is_told_in_its_own_words(self, calls: Path, model: Path) -> None:
        (calls.parent / "broken").touch()
        feeds = feeds_of(small_graph())
        with pytest.raises(RunFailed, match="trtexec: trtexec ended with exit code 1") as caught:
            run_benchmark([Subject("trtexec", "trtexec", model)], feeds=feeds, rounds=2, min_time=0.01)
        assert caught.value.where == ("Error[4]: the network is not strong enough",)

    def test_is_looked_for_where_nvidias_packages_put_it(self, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(trtexec, "PLACES", (str(calls.parent),))
        assert trtexec.find_trtexec() == str(calls.parent / "trtexec")
