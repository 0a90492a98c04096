"""Sessions of plans on a GPU that is not there: what `tests/runtime/test_plan_session.py` runs beside the stand-ins."""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

import cnncc_runtime
from cnncc_runtime import gpu
from cnncc_runtime.bundle import REFERENCE, EngineRecord, TargetRecord, read_bundle, write_bundle
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.errors import (
    BundleRefused,
    CnnccError,
    DataRefused,
    EngineMismatch,
    RunFailed,
    TargetUnavailable,
    UsageError,
)
from cnncc_runtime.plan_session import PlanSession
from cnncc_runtime.specs import TensorSpec
from tests.cli.harness import call
from tests.runtime.engine_files import manifest

PLAN = "engine.plan"
TENSORRT, RTX = "tensorrt 10.16.1.11", "tensorrt-rtx 1.7.1.116"
WEIGHT = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test frees what it took of the GPU."""
    gpu.host_gpus.cache_clear()
    gpu.driver_cuda.cache_clear()
    yield
    gc.collect()
    assert ctypes.CDLL("libcuda.so.1").standInAlive() == 0


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which versions are installed: ``versions(tensorrt_cu13="10.16.1.11")``."""

    def install(**found: str) -> None:
        for name, version in found.items():
            folder = tmp_path / "installed" / f"{name}-{version}.dist-info"
            folder.mkdir(parents=True)
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / "installed"))

    return install


def plan(batch: int | str, producer: str = "") -> bytes:
    """Return y = x · W and z = relu(y), as the stand-in takes plans."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product"), helper.make_node("Relu", ["y"], ["z"], "relu")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 4]) for name in ("y", "z")],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, producer_name=producer, ir_version=9, opset_imports=opsets).SerializeToString()


@pytest.fixture
def bundle(tmp_path: Path) -> Make:
    """Make a bundle: ``bundle(batches=(1, 4), abi=…, gpu=…, plan=…)``."""

    def make(
        batches: tuple[int, ...] = (),
        abi: str = TENSORRT,
        gpu: str = "8.9",
        engine: bytes | None = None,
        **changes: Any,
    ) -> Path:
        batch: int | str = "N" if batches else 2
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}.cnncc"
        folder.mkdir()
        described = manifest(
            [TensorSpec("x", (batch, 6))],
            [TensorSpec("y", (batch, 4)), TensorSpec("z", (batch, 4))],
            target=TargetRecord("cuda", "some-gpu", "", "", host_machine(), (), gpu),
            engine=EngineRecord(PLAN, abi.partition(" ")[0], abi, dict.fromkeys(batches or (0,), "profile 0")),
            batches=batches,
        )
        files: dict[str, tuple[str, Path | bytes]] = {
            PLAN: ("engine", engine or plan(batch)),
            REFERENCE: ("reference", plan(batch)),
        }
        write_bundle(folder, replace(described, **changes), files)
        return folder

    return make


def feeds(batch: int = 2, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 6)).astype(np.float32)}


def check(outputs: dict[str, Any], given: dict[str, Any]) -> None:
    np.testing.assert_allclose(outputs["y"], given["x"] @ WEIGHT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["z"], np.maximum(given["x"] @ WEIGHT, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("abi", [TENSORRT, RTX])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_outputs_are_right_and_the_callers_own(bundle: Make, abi: str, cuda_graph: bool) -> None:
    with cnncc_runtime.open(bundle(abi=abi), cuda_graph=cuda_graph) as session:
        kept = [(given, session.run(given)) for given in (feeds(seed=seed) for seed in range(4))]
    for given, outputs in kept:
        check(outputs, given)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_every_batch_size_that_was_built_runs_in_any_order(bundle: Make, cuda_graph: bool) -> None:
    with cnncc_runtime.open(bundle(batches=(1, 4, 7)), cuda_graph=cuda_graph) as session:
        for seed, batch in enumerate((4, 1, 7, 7, 1, 4, 4, 1)):
            given = feeds(batch, seed)
            check(session.run(given), given)
        with pytest.raises(RunFailed, match="batch size 2 was not built"):
            session.run(feeds(2))
        with pytest.raises(RunFailed, match="batch size 0 was not built"):
            session.run(feeds(0))
        with pytest.raises(DataRefused, match="float64"):
            session.run({"x": np.zeros((1, 6))})


def test_arrays_of_any_layout_are_taken(bundle: Make) -> None:
    with cnncc_runtime.open(bundle()) as session:
        for given in (np.asfortranarray(feeds()["x"]), np.repeat(feeds()["x"], 2, axis=1)[:, ::2]):
            given.flags.writeable = False
            check(session.run({"x": given}), {"x": given})


def test_threads_wait_for_each_other(bundle: Make) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(20):
                given = feeds((1, 4)[step % 2], seed * 100 + step)
                check(session.run(given), given)
        except BaseException as exc:
            wrong.append(exc)

    with cnncc_runtime.open(bundle(batches=(1, 4)), threads=3) as session:
        assert session.threads == 1
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_times_of_the_gpu_and_of_kernels(bundle: Make) -> None:
    with cnncc_runtime.open(bundle(batches=(1, 4)), cuda_graph=True) as session:
        assert isinstance(session, PlanSession)
        assert session.gpu.name == "NVIDIA L4"
        assert len(times := session.device_times(feeds(4), 5)) == 5
        assert all(time > 0 for time in times)
        assert [name for name, _ in session.profile(feeds(1), 3)] == ["product", "relu"]
        given = feeds(4)
        check(session.run(given), given)


def test_what_is_not_closed_is_freed_when_nobody_uses_it(bundle: Make) -> None:
    session = cnncc_runtime.open(bundle())
    session.run(feeds())
    del session


def test_a_closed_session_says_so(bundle: Make) -> None:
    session = cnncc_runtime.open(bundle())
    session.close()
    session.close()
    with pytest.raises(RunFailed, match="the session is closed"):
        session.run(feeds())


def test_a_session_does_not_survive_a_fork_and_says_so(bundle: Make) -> None:
    with cnncc_runtime.open(bundle()) as session:
        child = os.fork()
        if child == 0:
            try:
                session.run(feeds())
            except RunFailed as exc:
                session.close()  # touches nothing of the parent's
                os._exit(42 if "before a fork" in exc.message else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        check(session.run(feeds()), feeds())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"engine": b"ftrt, cut off"}, BundleRefused, "TensorRT 10.16.1.11 does not take the plan: the plan"),
        ({"engine": plan(2, "starts never")}, RunFailed, "the engine cannot be started: it does not say why"),
        ({"inputs": (TensorSpec("v", (2, 6)),)}, BundleRefused, "the plan has input x: .* says input v: float32"),
        ({"inputs": (TensorSpec("x", (2, 6), "float16"),)}, BundleRefused, "the manifest says input x: float16"),
        ({"gpu": "12.0"}, EngineMismatch, r"compute capability 12\.0 \(some-gpu\), found: NVIDIA L4 .*8\.9"),
        ({"gpu": "9.0+"}, EngineMismatch, r"compute capability 9\.0\+ "),
        ({"abi": "tensorrt 10.16.1.12"}, EngineMismatch, "built for: tensorrt 10.16.1.12, found: TensorRT 10.16.1.11"),
        ({"abi": "tensorrt 10.17.0.1+"}, EngineMismatch, r"built for: tensorrt 10.17.0.1\+, found"),
        ({"abi": "tensorrt 9.3.0.1+"}, EngineMismatch, r"built for: tensorrt 9.3.0.1\+, found"),
        ({"parity": "pending"}, CnnccError, "parity is 'pending'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(bundle: Make, change: dict[str, Any], error: type[CnnccError], said: str) -> None:
    with pytest.raises(error, match=said):
        cnncc_runtime.open(bundle(**change))


def test_plans_for_newer_gpus_and_by_older_libraries_run(bundle: Make) -> None:
    with cnncc_runtime.open(bundle(gpu="8.0+", abi="tensorrt 10.14.1.48+")) as session:
        check(session.run(feeds()), feeds())


def test_an_old_driver_is_told_before_anything_loads(
    bundle: Make, versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(tensorrt_cu13="10.16.1.11")
    monkeypatch.setenv("STAND_IN_CUDA", "12040")
    with pytest.raises(TargetUnavailable, match=r"needs a driver for CUDA 13, this one is for 12\.4") as caught:
        cnncc_runtime.open(bundle())
    assert caught.value.hint == "install a newer NVIDIA driver"
    versions(tensorrt_cu12="10.16.1.11")


def test_the_lean_runtime_opens_version_compatible_plans_alone(
    bundle: Make, versions: Callable[..., None], tmp_path: Path
) -> None:
    versions(tensorrt_cu13="11.4.0.106", tensorrt_lean_cu13="10.16.1.11")
    (tmp_path / "installed" / "tensorrt_lean.py").write_text("from tensorrt import *\nfrom tensorrt import nptype\n")
    with cnncc_runtime.open(bundle(abi="tensorrt 10.16.1.11+")) as session:
        check(session.run(feeds()), feeds())
    found = r"found: TensorRT 11\.4\.0\.106, TensorRT's lean runtime 10\.16\.1\.11"
    with pytest.raises(EngineMismatch, match=found) as caught:
        cnncc_runtime.open(bundle())
    assert "pip install tensorrt-cu13==10.16.1.11 cuda-bindings" in caught.value.hint


def test_a_full_gpu_is_told_in_its_own_words(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_MEMORY", "100")
    with pytest.raises(RunFailed, match=r"the GPU is out of memory \(0 of 0 MiB are free\)") as caught:
        cnncc_runtime.open(bundle(batches=(1, 64)))
    assert "smaller batches" in caught.value.hint


def test_an_engine_that_fails_leaves_a_session_to_be_closed(bundle: Make) -> None:
    for cuda_graph in (False, True):
        with cnncc_runtime.open(bundle(engine=plan(2, "runs never")), cuda_graph=cuda_graph) as session:
            for _ in range(2):
                with pytest.raises(RunFailed, match="the engine failed: no kernel for this GPU"):
                    session.run(feeds())


def test_an_engine_that_cannot_be_captured_says_so(bundle: Make) -> None:
    path = bundle(engine=plan(2, "captured never"))
    with (
        cnncc_runtime.open(path, cuda_graph=True) as session,
        pytest.raises(
            RunFailed, match="cannot be launched as a CUDA graph: the engine failed: what shapes need"
        ) as caught,
    ):
        session.run(feeds())
    assert caught.value.hint == "open it without cuda_graph"
    with cnncc_runtime.open(path) as session:
        check(session.run(feeds()), feeds())


def test_a_batch_that_the_plan_does_not_take_leaves_the_others(bundle: Make) -> None:
    with cnncc_runtime.open(bundle(batches=(1, 3))) as session:
        with pytest.raises(RunFailed, match="the engine does not take batch size 3: 3 is not in the profile"):
            session.run(feeds(3))
        check(session.run(feeds(1)), feeds(1))


def test_outputs_of_another_size_are_refused_before_they_are_written(bundle: Make) -> None:
    outputs = (TensorSpec("y", (2, 3)), TensorSpec("z", (2, 4)))
    with (
        cnncc_runtime.open(bundle(outputs=outputs)) as session,
        pytest.raises(RunFailed, match=r"output 'y' is \[2, 4\], the manifest says \[2, 3\]"),
    ):
        session.run(feeds())


@pytest.fixture
def stripped(bundle: Make, tmp_path: Path) -> Make:
    """Make a bundle whose engine lacks its weights; they lie beside it: ``stripped(w=…)``."""

    def make(**weights: Any) -> Path:
        source = bundle()
        manifest = read_bundle(source).manifest
        folder = tmp_path / "stripped.cnncc"
        folder.mkdir()
        content = io.BytesIO()
        np.savez(content, **weights)
        files: dict[str, tuple[str, Path | bytes]] = {
            PLAN: ("engine", plan(2).replace(WEIGHT.tobytes(), bytes(WEIGHT.nbytes))),
            "weights.npz": ("weights", content.getvalue()),
        }
        write_bundle(folder, replace(manifest, engine=replace(manifest.engine, refit="weights.npz")), files)
        return folder

    return make


def test_a_stripped_engine_is_given_its_weights(stripped: Make) -> None:
    with cnncc_runtime.open(stripped(w=WEIGHT, surplus=WEIGHT)) as session:
        check(session.run(feeds()), feeds())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"v": WEIGHT}, "the engine asks for 1 weights that its file lacks"),
        ({"w": WEIGHT[:5]}, "the engine's weights 'w' have 96 bytes, its file has 80"),
        ({"w": np.array([{}], object)}, "the engine's weights cannot be read: "),
    ],
)
def test_weights_that_do_not_fit_are_refused(stripped: Make, weights: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleRefused, match=said):
        cnncc_runtime.open(stripped(**weights))


def test_a_cuda_graph_is_for_gpus(bundle: Make) -> None:
    path = bundle(target=TargetRecord("llvm", "host", "", "generic", host_machine(), ()))
    with pytest.raises(UsageError, match="cuda_graph is for engines for GPUs"):
        cnncc_runtime.open(path, cuda_graph=True)


def test_what_rtx_compiled_is_kept_and_made_anew_when_it_is_damaged(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNCC_CACHE_DIR", str(tmp_path / "cache"))
    path = bundle(abi=RTX)

    def compilations() -> int:
        before = tensorrt_rtx.compilations
        with cnncc_runtime.open(path) as session:
            check(session.run(feeds()), feeds())
        return int(tensorrt_rtx.compilations - before)

    assert [compilations() for _ in range(3)] == [1, 0, 0]
    [kept] = (tmp_path / "cache" / "jit").iterdir()
    kept.write_bytes(b"of another driver")
    assert [compilations() for _ in range(2)] == [1, 0]
    monkeypatch.setenv("STAND_IN_GPU", "NVIDIA RTX 4090,8.9")
    gpu.host_gpus.cache_clear()
    assert [compilations() for _ in range(2)] == [1, 0], "each GPU has its own"


def test_a_cache_that_cannot_be_written_is_told_and_does_no_harm(
    bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CNNCC_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING), cnncc_runtime.open(bundle(abi=RTX)) as session:
        check(session.run(feeds()), feeds())
    assert "compiled kernels are not kept, the next start compiles again" in caplog.text


def test_verify_completes_a_parity_that_was_pending(bundle: Make) -> None:
    path = bundle(batches=(1, 4), parity="pending", abi=RTX)
    with pytest.raises(CnnccError, match="parity is 'pending'"):
        cnncc_runtime.open(path)
    call("verify", path)
    assert read_bundle(path).manifest.parity == "passed"
    check(cnncc_runtime.load(path)(feeds(4)), feeds(4))


def test_verify_marks_an_engine_that_computes_something_else(bundle: Make) -> None:
    path = bundle(parity="pending", engine=plan(2).replace(WEIGHT.tobytes(), (WEIGHT * np.float32(1.001)).tobytes()))
    call("verify", path, code=1)
    assert read_bundle(path).manifest.parity != "passed"
