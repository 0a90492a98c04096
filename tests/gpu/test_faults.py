"""What goes wrong on a GPU ends in a typed error; whatever could crash runs in a process of its own."""

from __future__ import annotations

import gc
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cnncc_runtime
from cnncc.compiler.engine_process import EngineProcess
from cnncc_runtime.bundle import GOLDEN, PARITY, REFERENCE, read_bundle, write_bundle
from cnncc_runtime.cuda_device import CudaDevice
from cnncc_runtime.errors import BundleRefused, CnnccError, EngineMismatch, RunFailed
from cnncc_runtime.gpu import HostGpu
from tests.cli.harness import call
from tests.gpu.conftest import Compile
from tests.gpu.test_execution import feeds


def forged(bundle: Path, folder: Path, plan: bytes) -> Path:
    """Return a bundle with another plan, whose manifest agrees with it: as a hostile one would."""
    source = read_bundle(bundle)
    folder.mkdir()
    files = {name: (record.role, source.file(name)) for name, record in source.manifest.files.items()}
    write_bundle(folder, source.manifest, {**files, source.manifest.engine.file: ("engine", plan)})
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "noise in the head", "noise in the middle"])
def test_damaged_plans_end_in_a_typed_error(compiled: Compile, damage: str, tmp_path: Path) -> None:
    bundle = compiled("fp32")
    plan = read_bundle(bundle).file("engine.plan").read_bytes()
    noise, half = np.random.default_rng(0).bytes(4096), len(plan) // 2
    damaged = {
        "cut": plan[:half],
        "empty": b"",
        "noise in the head": noise + plan[4096:],
        "noise in the middle": plan[:half] + noise + plan[half + 4096 :],
    }[damage]
    path = forged(bundle, tmp_path / "b.cnncc", damaged)
    try:
        with EngineProcess(path) as engine:
            outputs = engine.run(feeds())
    except (BundleRefused, RunFailed):
        return
    assert damage == "noise in the middle", "the library may not see what it does not read"
    assert outputs


def test_a_plan_that_was_changed_is_not_deserialized(compiled: Compile, tmp_path: Path) -> None:
    path = tmp_path / "b.cnncc"
    shutil.copytree(compiled("fp32"), path)
    plan = bytearray((path / "engine.plan").read_bytes())
    plan[len(plan) // 2] ^= 1
    (path / "engine.plan").write_bytes(plan)
    with pytest.raises(BundleRefused, match="was changed after it was built"):
        cnncc_runtime.open(path)


def test_a_plan_for_another_gpu_is_refused_and_one_that_lies_fails_typed(
    gpu: HostGpu, digits_flags: tuple[str | Path, ...], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    device, capability = ("sm86", "8.6") if gpu.capability != "8.6" else ("sm120", "12.0")
    bundle = tmp_path / "other.cnncc"
    arguments = ("--target", "cuda", "--backend", "tensorrt-rtx", "--device", device, "-o", bundle)
    assert "parity pending" in call("compile", *digits_flags, *arguments).stdout
    with pytest.raises(EngineMismatch, match=f"compute capability {capability}"):
        cnncc_runtime.open(bundle, allow_unverified=True)
    opened = read_bundle(bundle)
    lying = replace(opened.manifest, target=replace(opened.manifest.target, gpu=gpu.capability))
    files = {name: (record.role, opened.file(name)) for name, record in opened.manifest.files.items()}
    (tmp_path / "lying.cnncc").mkdir()
    write_bundle(tmp_path / "lying.cnncc", lying, files)
    try:
        with EngineProcess(tmp_path / "lying.cnncc") as engine:
            engine.run(feeds())
    except CnnccError:
        return  # where the GPU runs it all the same, nothing is wrong


def test_an_engine_of_other_weights_does_not_pass(
    compiled: Compile, digits_flags: tuple[str | Path, ...], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = dict(load_file(digits_flags[-1]))
    name = next(name for name in arrays if name.endswith("weight"))
    save_file(arrays | {name: arrays[name] * np.float32(1.001)}, tmp_path / "other.safetensors")
    other = tmp_path / "other.cnncc"
    call("compile", digits_flags[0], "--weights", tmp_path / "other.safetensors", "--target", "cuda", "-o", other)
    path = forged(compiled("fp32"), tmp_path / "b.cnncc", read_bundle(other).file("engine.plan").read_bytes())
    call("verify", path, code=1)


def test_a_full_gpu_is_told(gpu: HostGpu, compiled: Compile) -> None:
    bundle = compiled("fp32")
    hog = CudaDevice(gpu.index)
    try:
        with hog:
            size = 1 << 40
            while size >= 1 << 20:
                try:
                    hog.allocate(size)
                except RunFailed:
                    size //= 2
        with pytest.raises((RunFailed, BundleRefused)), EngineProcess(bundle) as engine:
            engine.run(feeds())
    finally:
        hog.close()


def test_sessions_leave_no_memory_behind(gpu: HostGpu, compiled: Compile) -> None:
    from cuda.bindings import driver

    watch = CudaDevice(gpu.index)
    try:

        def free() -> int:
            gc.collect()
            with watch:
                return int(driver.cuMemGetInfo()[1])

        left = []
        for _ in range(6):
            with ExitStack() as sessions:
                for cuda_graph in (False, True):
                    session = sessions.enter_context(cnncc_runtime.open(compiled("fp32"), cuda_graph=cuda_graph))
                    for _ in range(3):
                        session.run(feeds())
            left.append(free())
        assert left[1] - left[-1] < 32 << 20, left
    finally:
        watch.close()


def test_what_was_pending_is_completed_on_the_gpu(compiled: Compile, tmp_path: Path) -> None:
    source = read_bundle(compiled("int8"))
    path = tmp_path / "pending.cnncc"
    path.mkdir()
    records = source.manifest.files.items()
    files = {name: (record.role, source.file(name)) for name, record in records if name != PARITY}
    assert {GOLDEN, REFERENCE} <= files.keys()
    write_bundle(path, replace(source.manifest, parity="pending"), files)
    call("verify", path)
    assert read_bundle(path).manifest.parity == "passed"


def test_what_rtx_compiles_is_kept(compiled: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if read_bundle(compiled("fp32")).manifest.engine.format != "tensorrt-rtx":
        pytest.skip("only TensorRT-RTX compiles on the device")
    monkeypatch.setenv("CNNCC_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        with cnncc_runtime.open(compiled("fp32")) as session:
            session.run(feeds())
        [kept] = (tmp_path / "jit").iterdir()
        size, made = kept.stat().st_size, kept.stat().st_mtime_ns
        assert size > 0
    with cnncc_runtime.open(compiled("fp32")) as session:
        session.run(feeds())
    assert kept.stat().st_mtime_ns == made, "nothing was compiled again"
