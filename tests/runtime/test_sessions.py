"""Sessions: what they refuse before loading, what they compute, what they leave behind."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cnncc_runtime
from cnncc_runtime.bundle import MANIFEST, EngineRecord, TargetRecord, read_bundle
from cnncc_runtime.cpu import HostCpu, host_machine
from cnncc_runtime.errors import (
    BundleRefused,
    CheckFailed,
    CnnccError,
    DataRefused,
    EngineMismatch,
    ParityFailed,
    RunFailed,
    TargetUnavailable,
    UsageError,
)
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.session import FORMATS, engine_mismatch
from cnncc_runtime.specs import DTYPES, TensorSpec
from cnncc_runtime.tvm_runtime import ABI, VARIABLE, locate
from cnncc_runtime.weights import ALIGNMENT, aligned_empty
from tests.runtime.conftest import HEAVY, WEIGHTY
from tests.runtime.engine_files import ENGINE, conv_reference, make_bundle, manifest

Make = Callable[..., Path]

FOUR = ([TensorSpec("x", (4,))], [TensorSpec("y", (4,))])
BATCHED = {
    "batches": (1, 4),
    "engine": EngineRecord(ENGINE, "tvm-vm", ABI, {1: "main_1", 4: "main_4"}),
    "inputs": (TensorSpec("x", ("N", 3, 16, 16)),),
    "outputs": (TensorSpec("y", ("N", 8, 16, 16)),),
}


def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(1).standard_normal(shape).astype("f")


def test_a_convolution_is_computed(bundle: Make) -> None:
    x = noise(1, 3, 16, 16)
    with cnncc_runtime.open(bundle()) as session:
        assert session.inputs == (TensorSpec("x", (1, 3, 16, 16)),)
        assert session.outputs == (TensorSpec("y", (1, 8, 16, 16)),)
        assert session.batches == ()
        assert session.threads >= 1
        got = session.run({"x": x})
    assert list(got) == ["y"]
    np.testing.assert_allclose(got["y"], conv_reference(x), rtol=1e-5, atol=1e-5)


def test_a_profile_times_every_kernel_call_in_order(bundle: Make) -> None:
    x = noise(1, 3, 16, 16)
    with cnncc_runtime.open(bundle()) as session:
        found = session.profile({"x": x}, 3)  # type: ignore[attr-defined]
        assert found
        assert [name for name, _ in found] == [name for name, _ in session.profile({"x": x}, 1)]  # type: ignore[attr-defined]
        assert all(0 < seconds < 1 for _, seconds in found)
        np.testing.assert_allclose(session.run({"x": x})["y"], conv_reference(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(DataRefused):
            session.profile({"x": x[..., 1:]}, 1)  # type: ignore[attr-defined]
    with pytest.raises(RunFailed, match="closed"):
        session.profile({"x": x}, 1)  # type: ignore[attr-defined]


def test_inputs_of_every_memory_layout_give_the_same(bundle: Make) -> None:
    x = noise(1, 3, 16, 16)
    aligned = aligned_empty(x.shape, x.dtype)
    assert aligned.ctypes.data % ALIGNMENT == 0
    aligned[...] = x
    odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    transposed = np.ascontiguousarray(x.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    frozen = aligned.copy()
    frozen.flags.writeable = False
    with cnncc_runtime.open(bundle()) as session:
        wanted = session.run({"x": aligned})["y"]
        for other in (x, odd, transposed, frozen, np.repeat(x, 2, axis=3)[..., ::2], x[..., ::-1][..., ::-1]):
            np.testing.assert_array_equal(session.run({"x": other})["y"], wanted)
    np.testing.assert_array_equal(aligned, x)


def test_so_do_large_inputs_which_are_not_copied_where_they_need_not_be(bundle: Make) -> None:
    x = noise(512, 64)
    aligned = aligned_empty(x.shape, x.dtype)
    aligned[...] = x
    odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    frozen = aligned.copy()
    frozen.flags.writeable = False
    with cnncc_runtime.open(bundle("heavy", *HEAVY)) as session:
        wanted = session.run({"x": aligned})["y"]
        for other in (x, odd, frozen, np.asfortranarray(x), x[::-1][::-1]):
            np.testing.assert_array_equal(session.run({"x": other})["y"], wanted)
    np.testing.assert_array_equal(aligned, x)


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"x": np.zeros((1, 3, 16, 16), "d")},
        {"x": np.zeros((1, 3, 16, 16), ">f4")},
        {"x": np.zeros((1, 3, 16, 15), "f")},
        {"x": [[0.0]]},
        {"x": np.zeros((1, 3, 16, 16), "f"), "z": np.zeros(1, "f")},
        {"z": np.zeros((1, 3, 16, 16), "f")},
    ],
    ids=["missing", "float64", "big-endian", "narrow", "a list", "surplus", "unknown"],
)
def test_what_does_not_fit_is_refused_after_what_did(bundle: Make, feeds: Any) -> None:
    good = {"x": noise(1, 3, 16, 16)}
    with cnncc_runtime.open(bundle()) as session:
        wanted = session.run(good)["y"]
        for _ in range(2):
            with pytest.raises(DataRefused):
                session.run(feeds)
        np.testing.assert_array_equal(session.run(good)["y"], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_type_goes_in_and_out(bundle: Make, dtype: str) -> None:
    specs = ([TensorSpec("x", (2, 3), dtype)], [TensorSpec("y", (2, 3), dtype)])
    x = np.array([[0, 1, 2], [3, 0, 5]]).astype(dtype)
    with cnncc_runtime.load(bundle(f"same-{dtype}", *specs)) as model:
        y = model(x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x[::-1])


def test_results_stay_after_later_runs_and_after_closing(bundle: Make) -> None:
    session = cnncc_runtime.open(bundle())
    first = session.run({"x": noise(1, 3, 16, 16)})["y"]
    kept = first.copy()
    for _ in range(20):
        session.run({"x": np.zeros((1, 3, 16, 16), "f")})
    np.testing.assert_array_equal(first, kept)
    session.close()
    del session
    gc.collect()
    np.testing.assert_array_equal(first, kept)
    assert first.flags.owndata
    first[...] = 0


@pytest.mark.parametrize("name", ["identity", "constant"])
def test_writing_to_a_result_changes_neither_weights_nor_inputs(bundle: Make, name: str) -> None:
    x = aligned_empty((4,), np.dtype("f"))
    x[...] = [5, 6, 7, 8]
    with cnncc_runtime.open(bundle(name, *FOUR)) as session:
        first = session.run({"x": x})["y"]
        kept = first.copy()
        first[...] = -1
        np.testing.assert_array_equal(session.run({"x": x})["y"], kept)
    np.testing.assert_array_equal(x, [5, 6, 7, 8])


def test_inputs_and_outputs_keep_the_manifests_order_whatever_the_feeds(bundle: Make) -> None:
    a, b = np.full(4, 5, "f"), np.full(4, 3, "f")
    specs = ([TensorSpec("b", (4,)), TensorSpec("a", (4,))], [TensorSpec("y", (4,))])
    with cnncc_runtime.load(bundle("minus", *specs)) as model:
        np.testing.assert_array_equal(model(b, a), b - a)
        np.testing.assert_array_equal(model({"a": a, "b": b})["y"], b - a)
        with pytest.raises(DataRefused, match="1 inputs were given, the model takes 2: b, a"):
            model(a)
    both = ([TensorSpec("x", (4,))], [TensorSpec("twice", (4,)), TensorSpec("square", (4,))])
    with cnncc_runtime.load(bundle("two", *both)) as model:
        twice, square = model(a)
        np.testing.assert_array_equal(twice, 2 * a)
        np.testing.assert_array_equal(square, a * a)
        assert list(model.session.run({"x": a})) == ["twice", "square"]


def test_each_batch_size_runs_its_own_function(bundle: Make) -> None:
    with cnncc_runtime.open(bundle("batches", **BATCHED)) as session:
        assert session.batches == (1, 4)
        for batch in (4, 1, 4):
            x = noise(batch, 3, 16, 16)
            np.testing.assert_allclose(session.run({"x": x})["y"], conv_reference(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(RunFailed, match="batch size 3 was not built, the bundle holds 1, 4"):
            session.run({"x": noise(3, 3, 16, 16)})


def test_inputs_of_two_batch_sizes_are_refused(bundle: Make) -> None:
    specs = ([TensorSpec("a", ("N",)), TensorSpec("b", ("N",))], [TensorSpec("y", ("N",))])
    record = EngineRecord(ENGINE, "tvm-vm", ABI, {4: "main"})
    with (
        cnncc_runtime.open(bundle("minus", *specs, batches=(4,), engine=record)) as session,
        pytest.raises(DataRefused, match="'N' is 4 in input 'a' and 3 in 'b'"),
    ):
        session.run({"a": np.zeros(4, "f"), "b": np.zeros(3, "f")})


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"y": np.zeros((1, 3, 16, 16), "f")},
        {"x": np.zeros((1, 3, 16), "f")},
        {"x": np.zeros((2, 3, 16, 16), "f")},
        {"x": np.zeros((1, 3, 16, 16))},
        {"x": np.zeros((1, 3, 16, 16), ">f4")},
        {"x": [0.0]},
    ],
    ids=["none", "name", "rank", "shape", "dtype", "byte order", "list"],
)
def test_feeds_that_do_not_fit_are_refused_and_the_session_lives_on(bundle: Make, feeds: dict[str, Any]) -> None:
    with cnncc_runtime.open(bundle()) as session:
        with pytest.raises(DataRefused):
            session.run(feeds)
        session.run({"x": noise(1, 3, 16, 16)})


def test_an_error_inside_the_engine_is_said_in_one_line(bundle: Make) -> None:
    lying = ([TensorSpec("x", (1, 3, 8, 16))], [TensorSpec("y", (1, 8, 16, 16))])
    with cnncc_runtime.open(bundle("conv", *lying)) as session, pytest.raises(RunFailed) as caught:
        session.run({"x": noise(1, 3, 8, 16)})
    assert "match_cast error" in caught.value.message
    assert "\n" not in caught.value.message
    missing = ([TensorSpec("x", (4,))], [TensorSpec("y", (4,)), TensorSpec("z", (4,))])
    with (
        cnncc_runtime.open(bundle("identity", *missing)) as session,
        pytest.raises(RunFailed, match="1 outputs, the manifest lists 2"),
    ):
        session.run({"x": np.zeros(4, "f")})


def test_an_engine_that_needs_what_is_not_there_is_refused(bundle: Make) -> None:
    with pytest.raises(BundleRefused, match=r"cannot be started: .*no\.such\.function"):
        cnncc_runtime.open(bundle("absent", *FOUR))
    record = EngineRecord(ENGINE, "tvm-vm", ABI, {0: "other"})
    with pytest.raises(BundleRefused, match=r"cannot be started: .*other"):
        cnncc_runtime.open(bundle("identity", *FOUR, engine=record))


def test_an_engine_that_brings_no_threads_is_refused(bundle: Make) -> None:
    with pytest.raises(BundleRefused, match="brings no threads") as caught:
        cnncc_runtime.open(bundle("threadless", *FOUR))
    assert caught.value.hint == "build the bundle again"


def test_an_engine_from_before_engines_brought_threads_is_refused(bundle: Make) -> None:
    record = EngineRecord(ENGINE, "tvm-vm", "tvm-ffi 0.1, tvm 0.27", {0: "main"})
    with pytest.raises(EngineMismatch, match=r"built for: tvm-ffi 0\.1, tvm 0\.27, found: .*threads 1"):
        cnncc_runtime.open(bundle(engine=record))


def test_a_closed_session_says_so(bundle: Make) -> None:
    session = cnncc_runtime.open(bundle())
    session.close()
    session.close()
    with pytest.raises(RunFailed, match="session is closed"):
        session.run({"x": noise(1, 3, 16, 16)})


# Before anything is loaded


@pytest.mark.parametrize(("parity", "error"), [("failed", ParityFailed), ("pending", CheckFailed)])
def test_an_unproven_engine_opens_only_when_asked_for(bundle: Make, parity: str, error: type[CnnccError]) -> None:
    path = bundle(parity=parity)
    for opener in (cnncc_runtime.open, cnncc_runtime.load):
        with pytest.raises(error) as caught:
            opener(path)
        assert caught.value.exit_code == 1
        assert "allow_unverified" in caught.value.hint
    cnncc_runtime.open(path, allow_unverified=True).close()


def test_a_changed_engine_is_refused(bundle: Make) -> None:
    path = bundle()
    content = bytearray((path / ENGINE).read_bytes())
    content[-1] ^= 1
    (path / ENGINE).write_bytes(content)
    with pytest.raises(BundleRefused, match="was changed after it was built"):
        cnncc_runtime.open(path)
    (path / ENGINE).write_bytes(content[:-1])
    with pytest.raises(BundleRefused, match="the manifest says"):
        cnncc_runtime.open(path)


def test_an_engine_of_another_machine_is_refused_by_its_elf_header(tmp_path: Path, engines: Path) -> None:
    content = bytearray((engines / "conv.so").read_bytes())
    other, name = (183, "aarch64") if host_machine() == "x86_64" else (62, "x86_64")
    content[18:20] = other.to_bytes(2, "little")
    with pytest.raises(EngineMismatch, match=f"built for: {name}, found: {host_machine()}") as caught:
        cnncc_runtime.open(make_bundle(tmp_path / "b.cnncc", manifest(), bytes(content)))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"not an engine", b"\x7fELF"])
def test_what_is_no_engine_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleRefused, match="not a usable ELF file"):
        cnncc_runtime.open(make_bundle(tmp_path / "b.cnncc", manifest(), content))


def test_a_truncated_engine_with_a_matching_digest_is_refused(tmp_path: Path, engines: Path) -> None:
    whole = (engines / "conv.so").read_bytes()
    for number, length in enumerate((len(whole) // 2, len(whole) - 1, 5000)):
        with pytest.raises(BundleRefused, match="truncated"):
            cnncc_runtime.open(make_bundle(tmp_path / f"{number}.cnncc", manifest(), whole[:length]))


def test_an_executable_in_the_engines_place_is_refused(tmp_path: Path, engines: Path) -> None:
    content = bytearray((engines / "conv.so").read_bytes())
    content[16:18] = (2).to_bytes(2, "little")
    with pytest.raises(BundleRefused, match="ELF executable file"):
        cnncc_runtime.open(make_bundle(tmp_path / "b.cnncc", manifest(), bytes(content)))


def test_features_that_this_machine_lacks_are_named(bundle: Make) -> None:
    target = TargetRecord("llvm", "pi9", "", "cortex-z9", host_machine(), ("quantum", "teleport"))
    with pytest.raises(EngineMismatch, match=r"built for: cortex-z9, found: .* lacks quantum, teleport"):
        cnncc_runtime.open(bundle(target=target))


def test_another_machine_is_named_with_its_device() -> None:
    pi = HostCpu("aarch64", "Raspberry Pi 4", frozenset({"neon"}), 4, 4)
    target = TargetRecord("llvm", "pi5", "aarch64-linux-gnu", "cortex-a76", "aarch64", ("neon", "dotprod"))
    mismatch = engine_mismatch(target, pi)
    assert mismatch is not None
    assert mismatch.message == "built for: cortex-a76, found: Raspberry Pi 4, which lacks dotprod"
    assert engine_mismatch(replace(target, features=("neon",)), pi) is None
    mismatch = engine_mismatch(replace(target, machine="x86_64"), pi)
    assert mismatch is not None
    assert mismatch.message == "built for: x86_64 (pi5), found: aarch64 (Raspberry Pi 4)"


def test_an_engine_of_another_tvm_is_refused(bundle: Make) -> None:
    record = EngineRecord(ENGINE, "tvm-vm", "tvm-ffi 0.1, tvm 0.99", {0: "main"})
    with pytest.raises(EngineMismatch, match=r"built for: .*tvm 0\.99, found: "):
        cnncc_runtime.open(bundle(engine=record))


def test_formats_are_found_by_name(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(engine=EngineRecord(ENGINE, "riddle", ABI, {0: "main"}))
    with pytest.raises(
        BundleRefused, match="format is 'riddle', this runtime knows aot-static, tensorrt, tensorrt-rtx, tvm-vm"
    ):
        cnncc_runtime.open(path)
    monkeypatch.setitem(FORMATS, "riddle", "no_such_module_at_all:Session")
    with pytest.raises(TargetUnavailable, match="'riddle' cannot be run here"):
        cnncc_runtime.open(path)
    monkeypatch.setitem(FORMATS, "riddle", "cnncc_runtime.tvm_session:TvmSession")
    cnncc_runtime.open(path).close()


@pytest.mark.parametrize("threads", [0, -1, 100_000, 1.5, "2"])
def test_a_senseless_thread_count_is_refused(bundle: Make, threads: Any) -> None:
    with pytest.raises(UsageError, match="threads is"):
        cnncc_runtime.open(bundle(), threads=threads)


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_a_missing_runtime_is_named_with_the_way_out(bundle: Make, tmp_path: Path) -> None:
    code = f"""
import sys
import cnncc_runtime
from cnncc_runtime import tvm_runtime
from cnncc_runtime.errors import TargetUnavailable
if {{hide!r}}:
    tvm_runtime.locate = lambda: None
try:
    cnncc_runtime.open({str(bundle())!r})
except TargetUnavailable as exc:
    print(exc)
"""
    text = in_process(code.replace("{hide!r}", "False"), **{VARIABLE: str(tmp_path / "nowhere")}).stdout
    assert VARIABLE in text
    assert "nowhere" in text
    text = in_process(code.replace("{hide!r}", "True")).stdout
    assert "libtvm_runtime.so) is not on this machine" in text
    assert "pip install" in text
    (tmp_path / "libtvm_runtime.so").write_text("not a library")
    text = in_process(code.replace("{hide!r}", "False"), **{VARIABLE: str(tmp_path)}).stdout
    assert "cannot be loaded" in text


@pytest.mark.parametrize("order", ["import tvm; opened()", "opened(); import tvm; opened()", "opened()"])
def test_one_copy_of_the_runtime_whoever_comes_first(bundle: Make, order: str, tmp_path: Path) -> None:
    library = locate()
    assert library is not None
    other = {}
    if order.startswith("import tvm"):  # a second copy, as a device's image may have one: the first one counts
        shutil.copy(library, tmp_path / library.name)
        other = {VARIABLE: str(tmp_path)}
    code = f"""
import sys
import numpy as np
import cnncc_runtime
def opened():
    with cnncc_runtime.open({str(bundle())!r}) as session:
        session.run({{"x": np.zeros((1, 3, 16, 16), "f")}})
{order}
copies = {{line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime.so" in line}}
print(len(copies), *(name in sys.modules for name in ("tvm", "torch", "onnx", "onnxruntime")))
"""
    done = in_process(code, **other)
    assert done.returncode == 0, done.stderr
    count, tvm, torch, onnx, ort = done.stdout.split()
    assert count == "1"
    if "tvm" not in order:
        assert (tvm, torch, onnx, ort) == ("False",) * 4


def test_torch_can_still_be_imported_afterwards(bundle: Make) -> None:
    code = f"""
import warnings
import cnncc_runtime
cnncc_runtime.open({str(bundle())!r}).close()
import torch
print(torch.ones(2).sum().item())
"""
    done = in_process(code)
    assert done.stdout.strip() == "2.0", done.stderr


# Many at once, many in a row


def test_calls_from_several_threads_do_not_mix(bundle: Make) -> None:
    inputs = [noise(1, 3, 16, 16) * (number + 1) for number in range(4)]
    wrong: list[int] = []
    with cnncc_runtime.open(bundle(), threads=1) as session:
        wanted = [session.run({"x": x})["y"] for x in inputs]

        def work(number: int) -> None:
            for _ in range(100):
                if not np.array_equal(session.run({"x": inputs[number]})["y"], wanted[number]):
                    wrong.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


def test_sessions_of_one_engine_share_it_and_live_apart(bundle: Make) -> None:
    path = bundle()
    x = noise(1, 3, 16, 16)
    first, second = cnncc_runtime.open(path, threads=1), cnncc_runtime.open(path, threads=2)
    assert first._engine is second._engine  # type: ignore[attr-defined]
    wanted = first.run({"x": x})["y"]
    first.close()
    np.testing.assert_array_equal(second.run({"x": x})["y"], wanted)
    second.close()


def test_a_bundle_rebuilt_in_place_opens_anew(bundle: Make, engines: Path, tmp_path: Path) -> None:
    path = bundle("identity", *FOUR)
    x = np.full(4, 3, "f")
    before = cnncc_runtime.open(path)
    other = bundle("constant", *FOUR)
    path.rename(tmp_path / "away")
    other.rename(path)
    after = cnncc_runtime.open(path)
    np.testing.assert_array_equal(before.run({"x": x})["y"], x)
    np.testing.assert_array_equal(after.run({"x": x})["y"], np.arange(4))
    before.close()
    after.close()


def rss(field: str = "VmRSS") -> float:
    """This process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def pages(name: str) -> Counter[str]:
    """KiB of this process's mappings of a file, by kind."""
    found: Counter[str] = Counter()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = name in line
        elif inside and line.endswith(" kB"):
            found[line.split(":")[0]] += int(line.split()[1])
    return found


@pytest.mark.slow
def test_two_hundred_sessions_leave_no_memory_and_no_threads_behind(bundle: Make) -> None:
    path = bundle("weighty", *WEIGHTY)
    x = np.ones((1, 1024), "f")
    tasks = sizes = 0.0
    for cycle in range(200):
        with cnncc_runtime.open(path, threads=1) as session:
            if cycle % 10 == 0:
                session.run({"x": x})
        if cycle == 20:
            tasks, sizes = len(os.listdir("/proc/self/task")), rss()  # noqa: PTH208
    assert rss() - sizes < 16, "48 MiB of weights a session: a leak shows"
    assert len(os.listdir("/proc/self/task")) <= tasks  # noqa: PTH208
    assert len(list(Path("/proc/self/fd").iterdir())) < 100


def test_a_dropped_session_is_freed(bundle: Make) -> None:
    session = cnncc_runtime.open(bundle("weighty", *WEIGHTY), threads=1)
    session.run({"x": np.ones((1, 1024), "f")})
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


def test_weights_are_resident_once(bundle: Make) -> None:
    code = f"""
import numpy as np
from tests.runtime.test_sessions import rss
import cnncc_runtime, time
x = np.ones((1, 1024), "f")
path = {str(bundle("weighty", *WEIGHTY))!r}
cnncc_runtime.open({str(bundle())!r}).close()
before = rss()
start = time.perf_counter()
session = cnncc_runtime.open(path)
seconds = time.perf_counter() - start
opened = rss() - before
session.run({{"x": x}})
print(opened, seconds)
"""
    done = in_process(code)
    opened, seconds = map(float, done.stdout.split())
    assert opened < 48 * 1.5, "the weights are resident more than once"
    assert seconds < 1.0


# Forks and threads

FORK = """
import os, signal, sys, threading
import numpy as np
import cnncc_runtime
session = cnncc_runtime.open(sys.argv[1], threads=int(sys.argv[2]))
x = np.random.default_rng(0).standard_normal((512, 64)).astype("f")
wanted = session.run({"x": x})["y"]
child = os.fork()
if child == 0:
    signal.alarm(60)
    good = np.array_equal(session.run({"x": x})["y"], wanted)
    with cnncc_runtime.open(sys.argv[1], threads=int(sys.argv[2])) as another:
        good = good and np.array_equal(another.run({"x": x})["y"], wanted)
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
assert np.array_equal(session.run({"x": x})["y"], wanted)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_can_go_on(bundle: Make, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(bundle("heavy", *HEAVY)), str(threads)], timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr


THREADS = """
import os, sys, threading, time
import numpy as np
import cnncc_runtime
path, order = sys.argv[1:]
mask = os.sched_getaffinity(0)
x = np.ones((512, 64), "f")
def busy():
    # CPU time of each of the process's threads: unlike wall time, it does not depend on the machine's other work
    tasks = os.listdir("/proc/self/task")
    return {task: int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in tasks}
def shares(session):
    session.run({"x": x})
    time.sleep(0.5)  # until the other session's workers sleep
    before = busy()
    for _ in range(5):
        session.run({"x": x})
    spent = sorted((after - before.get(task, 0) for task, after in busy().items()), reverse=True)
    return [value / sum(spent) for value in spent[:3]] + [0.0] * 2
found = []
with cnncc_runtime.open(path, threads=1) as one, cnncc_runtime.open(path, threads=2) as two:
    sessions = [one, two, one, two] if order == "narrow first" else [two, one, two, one]
    work = lambda: found.extend(shares(session) for session in sessions)
    if order == "another thread":
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    else:
        work()
    for session, (first, second, third, *_) in zip(sessions, found):
        print(session.threads, f"{first:.3f} {second:.3f} {third:.3f}")
        if session.threads == 1:
            assert first > 0.9
        else:
            # on one core the caller may do it all: nobody waits for a worker that does not come
            assert second > 0.25 or len(mask) == 1
            assert third < 0.05
    for task in os.listdir("/proc/self/task"):
        assert os.sched_getaffinity(int(task)) == mask
"""


@pytest.mark.parametrize("order", ["narrow first", "wide first", "another thread"])
@pytest.mark.parametrize("masked", [False, True], ids=["all cores", "one core allowed"])
def test_a_session_uses_the_threads_it_was_given_and_moves_nobody(bundle: Make, order: str, masked: bool) -> None:
    mask = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n" if masked else ""
    done = subprocess.run(
        [sys.executable, "-c", mask + THREADS, str(bundle("heavy", *HEAVY)), order],
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def native_threads(expected: int = 0) -> int:
    """Threads of this process; those that were joined are listed for a moment, so it waits for what is expected."""
    end = time.monotonic() + 10
    while True:
        found = len(os.listdir("/proc/self/task"))  # noqa: PTH208
        if found <= expected or not expected or time.monotonic() > end:
            return found
        time.sleep(0.01)


def test_a_sessions_threads_start_with_its_first_run_and_end_with_it(bundle: Make) -> None:
    path = bundle("heavy", *HEAVY)
    x = noise(512, 64)
    before = native_threads()
    for dropped in (False, True):
        session = cnncc_runtime.open(path, threads=5)
        assert native_threads() == before
        session.run({"x": x})
        assert native_threads() == before + 4, "the session's, and none of TVM's"
        for number in range(3):
            caller = threading.Thread(target=session.run, args=({"x": x},), name=str(number))
            caller.start()
            caller.join()
        assert native_threads(before + 4) == before + 4, "they serve every caller"
        if not dropped:
            session.close()
        del session
        gc.collect()
        assert native_threads(before) == before


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_sessions_of_one_engine_run_side_by_side(bundle: Make, threads: int) -> None:
    path = bundle("heavy", *HEAVY)
    x = noise(512, 64)
    with cnncc_runtime.open(path, threads=1) as alone:
        wanted = alone.run({"x": x})["y"]
    wrong: list[int] = []

    def work(number: int) -> None:
        with cnncc_runtime.open(path, threads=threads) as session:
            for _ in range(3):
                if not np.array_equal(session.run({"x": x})["y"], wanted):
                    wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_an_engine_is_unmapped_after_its_threads_are_gone(bundle: Make) -> None:
    code = f"""
import gc
import numpy as np
import cnncc_runtime
path = {str(bundle("heavy", *HEAVY))!r}
def mapped():
    return path in open("/proc/self/maps").read()
for dropped in (False, True):
    session = cnncc_runtime.open(path, threads=4)
    session.run({{"x": np.ones((512, 64), "f")}})
    assert mapped()
    if not dropped:
        session.close()
    del session
    gc.collect()
    assert not mapped()
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr


# Models


def test_a_model_preprocesses_by_the_stored_contract(bundle: Make, tmp_path: Path) -> None:
    contract = Preprocessing(size=(16, 16))
    image = Image.new("RGB", (20, 30), (255, 0, 51))
    image.save(tmp_path / "i.png")
    with cnncc_runtime.load(bundle(preprocessing=contract)) as model:
        x = model.preprocess(tmp_path / "i.png")
        np.testing.assert_array_equal(x, contract.apply(image))
        np.testing.assert_array_equal(x, model.preprocess(str(tmp_path / "i.png")))
        np.testing.assert_array_equal(x, model.preprocess(image))
        np.testing.assert_allclose(model(x), conv_reference(x), rtol=1e-5, atol=1e-5)
    with cnncc_runtime.load(bundle()) as model, pytest.raises(DataRefused, match="stores no preprocessing"):
        model.preprocess(tmp_path / "i.png")


def test_a_bundle_that_was_read_can_be_opened(bundle: Make) -> None:
    path = bundle()
    opened = read_bundle(path)
    (path / MANIFEST).unlink()  # what was read counts
    cnncc_runtime.open(opened).close()
