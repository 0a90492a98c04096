"""Engines without the virtual machine: what their executables compute, here and under qemu, and what they need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cnncc.calibration.plan import layers_of, plan_for
from cnncc.calibration.qdq import insert_qdq
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.graph.reader import with_shapes
from cnncc.graph.reference import Reference
from cnncc.targets.base import BuildOptions, KernelOptions, Profile
from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.aot import build as aot_build
from cnncc.targets.llvm.aot.build import Aot, build_aot
from cnncc.targets.llvm.aot.source import c_name
from cnncc.targets.llvm.aot.toolchain import find_compiler
from cnncc_runtime.elf import read_elf
from cnncc_runtime.errors import TargetUnavailable, UsageError
from tests.calibration.graphs import Net, feeds_of, images, scales_for
from tests.targets.llvm.test_aarch64 import network

pytestmark = pytest.mark.slow

DIGIT = (3, 28, 28)


def digits() -> OnnxGraph:
    """Return the digits CNN, with random weights."""
    net = Net(1, *DIGIT)

    def layer(x: str, size: int) -> str:
        return net.node("MaxPool", [net.node("Relu", [net.conv(x, size)])], kernel_shape=[2, 2], strides=[2, 2])

    x = net.node("Flatten", [layer(layer("x", 32), 64)], size=64 * 7 * 7)
    net.gemm(net.node("Relu", [net.gemm(x, 128)]), 10, "scores")
    return with_shapes(net.graph())


def int8_digits() -> OnnxGraph:
    graph = digits()
    plan = plan_for(graph, layers_of(graph))
    assert len(plan.layers) == 4
    return insert_qdq(graph, plan, scales_for(graph, plan, feeds_of(images(4, shape=DIGIT))))


def residual() -> OnnxGraph:
    """Return blocks whose shortcuts live across them: an arena must not lay anything over those."""
    net = Net(1, *DIGIT)
    x = net.conv("x", 32)
    for _ in range(3):
        inner = net.conv(net.node("Relu", [net.conv(x, 32)]), 32)
        x = net.node("Relu", [net.node("Add", [inner, x])])
    net.gemm(net.flat(x), 10, "scores")
    return with_shapes(net.graph())


@dataclass(frozen=True)
class Machine:
    """What executables are built for and run on."""

    triple: str
    cpu: str
    qemu: tuple[str, ...]
    features: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def profile(self) -> Profile:
        if not self.triple:
            return named(resolve_profile())
        return named(resolve_profile(mtriple=self.triple, mcpu=self.cpu, mattr=self.features))

    def require(self) -> None:
        """Skip where tools are missing, but in CI fail: there, nothing may go untested unnoticed."""
        missing = [tool for tool in (*self.qemu[:1], *self.tools) if shutil.which(tool) is None]
        if missing and os.environ.get("CI"):
            pytest.fail(f"{missing} not found")
        if missing:
            pytest.skip(f"{missing} not found: `make aarch64` brings them")


MACHINES = {
    "host": Machine("", "", ()),
    "aarch64": Machine("aarch64-linux-gnu", "cortex-a72", ("qemu-aarch64", "-cpu", "cortex-a72"),
                       tools=("aarch64-linux-gnu-gcc",)),
    "armv7": Machine("armv7-linux-gnueabihf", "cortex-a7", ("qemu-arm", "-cpu", "cortex-a7"), ("+neon",),
                     tools=("arm-linux-gnueabihf-gcc",)),
}  # fmt: skip


def built(
    graph: OnnxGraph, machine: Machine, folder: Path, name: str = "net", kernels: KernelOptions | None = None
) -> Aot:
    folder.mkdir(exist_ok=True)
    options = BuildOptions(machine.profile, kernels=kernels or KernelOptions())
    return build_aot(graph, options, name, folder)


def executed(made: Aot, machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*machine.qemu, str(made.executable), *arguments]
    return subprocess.run(command, cwd=made.executable.parent, capture_output=True, text=True, check=False, timeout=300)


def outputs_of(made: Aot, graph: OnnxGraph, machine: Machine, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    folder = made.executable.parent
    for at, spec in enumerate(graph.inputs):
        np.save(folder / f"in{at}.npy", feeds[spec.name])
    names = [f"out{at}.npy" for at in range(len(graph.outputs))]
    done = executed(made, machine, *(f"in{at}.npy" for at in range(len(graph.inputs))), "-o", *names)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / name) for name in names]


def check(graph: OnnxGraph, machine: Machine, folder: Path, tolerance: float, *, winograd: bool = True) -> Aot:
    machine.require()
    made = built(graph, machine, folder, kernels=KernelOptions(winograd))
    elf = read_elf(made.executable)
    assert (elf.kind, elf.needed) == ("executable", ())
    for feeds in feeds_of(images(2, seed=3, shape=DIGIT)):
        [got] = outputs_of(made, graph, machine, feeds)
        [want] = Reference(graph).run(feeds).values()
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    return made


@pytest.mark.parametrize("name", MACHINES)
def test_the_digits_cnn_is_right_and_needs_no_library(name: str, tmp_path: Path) -> None:
    made = check(digits(), MACHINES[name], tmp_path, 1e-5)
    assert made.sizes.weights > 4 * 400_000
    assert made.sizes.arena < 400_000
    assert made.sizes.library > made.sizes.weights + made.sizes.code


@pytest.mark.parametrize("name", MACHINES)
def test_int8_is_right(name: str, tmp_path: Path) -> None:
    made = check(int8_digits(), MACHINES[name], tmp_path, 0.02)
    assert made.sizes.weights < 0.3 * 4 * 400_000


@pytest.mark.parametrize("name", MACHINES)
def test_a_network_without_rounding_is_exact(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    machine.require()
    made = built(network(), machine, tmp_path)
    [feeds] = feeds_of(images(1, shape=(3, 32, 32)))
    [got] = outputs_of(made, network(), machine, feeds)
    [want] = Reference(network()).run(feeds).values()
    np.testing.assert_array_equal(got, want)


def test_blocks_with_shortcuts_share_their_memory(tmp_path: Path) -> None:
    made = check(residual(), MACHINES["host"], tmp_path, 1e-5, winograd=False)
    image = 4 * 32 * DIGIT[1] * DIGIT[2]
    assert 3 * image <= made.sizes.arena < 6 * image  # of the ten images that it computes


def test_winograd_takes_memory(tmp_path: Path) -> None:
    direct, quick = (check(residual(), MACHINES["host"], tmp_path / name, 1e-5, winograd=name == "quick").sizes
                     for name in ("direct", "quick"))  # fmt: skip
    assert quick.arena > direct.arena
    assert quick.weights > direct.weights


def test_outputs_may_be_several_and_inputs_or_constants(tmp_path: Path) -> None:
    net = Net(1, *DIGIT)
    net.inputs["y"] = (1, 4)
    net.conv("x", 8, "left")
    net.node("Relu", ["left"], "both")
    net.node("Identity", ["both"], "again")
    net.node("Identity", ["y"], "same", size=4)
    net.node("Identity", [net.constant("fixed", np.arange(5, dtype=np.int64))], "int", size=5)
    graph = with_shapes(net.graph("left", "both", "again", "same", "int"))
    made = built(graph, MACHINES["host"], tmp_path)
    feeds = {"x": images(1, shape=DIGIT), "y": np.array([[1, 2, 3, 4]], np.float32)}
    found = outputs_of(made, graph, MACHINES["host"], feeds)
    for got, (name, want) in zip(found, Reference(graph).run(feeds).items(), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Aot:
    """One layer; its input and what it should be beside it."""
    net = Net(1, 3, 8, 8)
    net.conv("x", 4, "only")
    graph = with_shapes(net.graph())
    made = built(graph, MACHINES["host"], tmp_path_factory.mktemp("small"), "3 small-net")
    [feeds] = feeds_of(images(1))
    folder = made.executable.parent
    np.save(folder / "x.npy", feeds["x"])
    feeds["x"].tofile(folder / "x.raw")
    want = Reference(graph).run(feeds)["only"]
    np.save(folder / "want.npy", want)
    np.save(folder / "other.npy", want + 1)
    np.save(folder / "narrow.npy", feeds["x"][:, :2])
    np.save(folder / "double.npy", feeds["x"].astype(np.float64))
    (folder / "short.raw").write_bytes(b"1234")
    return made


def test_names_are_made_fit_for_c(small: Aot) -> None:
    assert small.executable.name == "_3_small_net"
    assert small.library.name == "lib_3_small_net.a"
    assert [c_name(name) for name in ("digits", "int", "a.b/c", "", "größe")] == [
        "digits", "_int", "a_b_c", "network", "gr_e"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["main", "kernels", "arena", "x"])
def test_a_network_may_have_any_name(name: str, tmp_path: Path) -> None:
    net = Net(1, *DIGIT)
    net.conv("x", 4, "arena")
    graph = with_shapes(net.graph())
    made = built(graph, MACHINES["host"], tmp_path, name)
    [feeds] = feeds_of(images(1, shape=DIGIT))
    [got] = outputs_of(made, graph, MACHINES["host"], feeds)
    np.testing.assert_allclose(got, Reference(graph).run(feeds)["arena"], rtol=1e-4, atol=1e-5)


def test_raw_and_npy_files_say_the_same(small: Aot) -> None:
    for given in ("x.npy", "x.raw"):
        assert executed(small, MACHINES["host"], given, "-o", "out.raw").returncode == 0
        got = np.fromfile(small.executable.parent / "out.raw", np.float32)
        np.testing.assert_allclose(got, np.load(small.executable.parent / "want.npy").ravel(), rtol=1e-4, atol=1e-5)


def test_the_executable_verifies_and_times_itself(small: Aot) -> None:
    host = MACHINES["host"]
    good = executed(small, host, "x.npy", "--verify", "want.npy")
    assert (good.returncode, good.stdout.split()[-1]) == (0, "passed")
    bad = executed(small, host, "x.npy", "--verify", "other.npy")
    assert (bad.returncode, bad.stdout.split()[-1]) == (1, "failed")
    assert executed(small, host, "x.npy", "--verify", "other.npy", "--tolerance", "100").returncode == 0
    timed = executed(small, host, "--bench", "5")
    assert timed.returncode == 0
    assert timed.stdout.startswith("5 runs: median ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["x.npy", "x.npy"], 2, "a file for each input"),
        (["x.npy", "-o", "a", "b"], 2, "a file for each output"),
        (["x.npy", "--fast"], 2, "--fast: unknown"),
        (["--bench", "many"], 2, "many: not such a number"),
        (["--bench"], 2, "give it a number"),
        (["missing.npy"], 4, "missing.npy: cannot be read"),
        (["narrow.npy"], 4, "narrow.npy: another shape"),
        (["double.npy"], 4, "double.npy: another type"),
        (["short.raw"], 4, "short.raw: fewer bytes"),
        (["x.npy", "-o", "no/such/folder"], 2, "cannot be written"),
    ],
)
def test_the_executable_refuses(arguments: list[str], code: int, said: str, small: Aot) -> None:
    done = executed(small, MACHINES["host"], *arguments)
    assert done.returncode == code
    assert said in done.stderr


APP = """
#include <stdio.h>
#include "first.h"
#include "second.h"
static float x[FIRST_X_ELEMENTS + 16] __attribute__((aligned(64)));
static float one[FIRST_ONLY_ELEMENTS] __attribute__((aligned(64)));
static float two[SECOND_ONLY_ELEMENTS] __attribute__((aligned(64)));
int main(void) {
    if (first_run(x + 1, one) != FIRST_MISALIGNED || first_run(x, 0) != FIRST_MISALIGNED) return 1;
    if (first_run(x, one) != FIRST_OK || second_run(x, two) != SECOND_OK) return 2;
    return one[0] == two[0];
}
"""


def test_an_app_links_two_networks_and_calls_them(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 1)):
        net = Net(1, 3, 8, 8, seed=seed)
        net.conv("x", 4, "only")
        built(with_shapes(net.graph()), MACHINES["host"], tmp_path, name)
    (tmp_path / "app.c").write_text(APP)
    options = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["cc", *options, "app.c", "libfirst.a", "libsecond.a", "-o", "app"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "app"], check=False).returncode == 0


def test_the_generated_c_draws_no_warnings(small: Aot) -> None:
    options = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command = ["cc", *options, "_3_small_net.c", "_3_small_net_main.c"]
    subprocess.run(command, cwd=small.executable.parent, check=True)


def test_kernels_call_nothing_but_libc(tmp_path: Path) -> None:
    built(network(), MACHINES["host"], tmp_path)
    command = ["nm", "--undefined-only", "--format=just-symbols", "net_kernels.o"]
    needed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert set(needed) <= {"memcpy", "memset", "memmove"}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (built(residual(), MACHINES["host"], tmp_path / name) for name in ("one", "other"))
    assert one.executable.read_bytes() == other.executable.read_bytes()
    assert one.library.read_bytes() == other.library.read_bytes()


def test_shapes_must_be_static(tmp_path: Path) -> None:
    net = Net("N", 3, 8, 8)
    net.conv("x", 4)
    with pytest.raises(UsageError) as refused:
        built(net.graph(), MACHINES["host"], tmp_path)
    assert "--batch" in refused.value.hint
    assert any("x: float32[N, 3, 8, 8]" in place for place in refused.value.where)


def test_without_a_compiler_sources_are_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(machine: str, host: str) -> None:
        raise TargetUnavailable(f"no C compiler for {machine}", hint="install one")

    monkeypatch.setattr(aot_build, "find_compiler", none)
    net = Net(1, 3, 8, 8)
    net.conv("x", 4)
    with pytest.raises(TargetUnavailable) as refused:
        built(with_shapes(net.graph()), MACHINES["host"], tmp_path)
    [line] = refused.value.where
    command = line.split(": ", 1)[1].replace("CC", "cc", 1)
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    assert read_elf(tmp_path / "net").needed == ()


def test_a_machine_without_compiler_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(TargetUnavailable) as refused:
        find_compiler("riscv64", "x86_64")
    assert "gcc-riscv64-linux-gnu" in refused.value.hint
