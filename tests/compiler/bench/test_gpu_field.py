"""Who is measured beside a bundle for a GPU, and on what: real bundles, built here, as if their GPU were here too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from cnncc.compiler.bench import bundle as bench
from cnncc.compiler.bench.bundle import BF16_AGREEMENT, open_field
from cnncc.compiler.bench.runner import AGREEMENT_LIMIT
from cnncc.compiler.cache import Cache
from cnncc_runtime.errors import UsageError
from cnncc_runtime.gpu import HostGpu
from tests.calibration.rtx import tensorrt_rtx
from tests.cli.harness import DIGITS, call

Compile = Callable[[str], Path]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def compiled(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Compile the digits CNN for another machine's GPU, and pretend that it is this one's second."""
    tensorrt_rtx()
    monkeypatch.setattr(bench, "obstacle", lambda _target, _engine: None)
    monkeypatch.setattr(bench, "host_gpu", lambda capability: {"8.9": HostGpu("NVIDIA L4", "8.9", 1)}[capability])

    def compile_(precision: str) -> Path:
        path = tmp_path / f"{precision}.cnncc"
        data = ("--data", "random", "--calibration-samples", "4") if precision == "int8" else ()
        flags = ("--target", "cuda", "--device", "sm89", "--precision", precision, "--cache-dir", cache)
        flags += ("--max-fallback", "1") if precision == "bf16" else ()  # TensorRT-RTX widens one of its products
        call("compile", f"{DIGITS}:build", "--input-shape", "1,3,28,28", "-o", path, *flags, *data)
        return path

    return compile_


@pytest.mark.parametrize(
    ("precision", "ort", "torch", "limit"),
    [
        ("fp32", "fp32", "fp32", AGREEMENT_LIMIT),
        ("fp16", "fp16", "fp16", AGREEMENT_LIMIT),
        ("bf16", "bf16", "bf16", BF16_AGREEMENT),
        ("int8", "fp32, Q/DQ", "fp32", AGREEMENT_LIMIT),
    ],
)
def test_everyone_is_on_one_gpu_and_peers_compute_in_the_bundles_precision(
    compiled: Compile, cache: Path, precision: str, ort: str, torch: str, limit: float
) -> None:
    with open_field(compiled(precision), None, batch=0, cache=Cache(cache), also=["torch-cuda"]) as field:
        assert [subject.name for subject in field.subjects] == ["cnncc", "ort-cuda", "torch-cuda"]
        assert [subject.precision for subject in field.subjects] == [precision, ort, torch]
        assert {subject.options["gpu"] for subject in field.subjects} == {"1"}
        assert (field.gpu, field.agreement) == (1, limit)
        ours, theirs, program = field.subjects
        assert program.options["precision"] == (precision if precision in ("fp16", "bf16") else "")
        assert (program.approximate, ours.approximate) == (precision == "int8", False)
        weights = {tensor.data_type for tensor in onnx.load(theirs.path).graph.initializer if len(tensor.dims) == 4}
    kinds = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "INT8"}
    assert weights == {onnx.TensorProto.DataType.Value(kinds[precision])}


def test_peers_on_the_cpu_are_refused_before_anyone_is_opened(compiled: Compile, cache: Path) -> None:
    path = compiled("fp32")
    with (
        pytest.raises(UsageError, match="'torch' computes on the CPU, the bundle's engine on a GPU") as caught,
        open_field(path, ["torch"], batch=0, cache=Cache(cache)),
    ):
        pass
    assert caught.value.hint == "its peers are ort-cuda, torch-cuda, torch-compile-cuda, trtexec"
    with open_field(path, ["ort", "torch-cuda"], batch=0, cache=Cache(cache), lenient=True) as field:
        assert [subject.name for subject in field.subjects] == ["cnncc", "torch-cuda"]
        assert [peer.name for peer in field.referee.refused] == ["ort"]
