"""The engine's threads, as the compiler sees them: their assembly, and loops that our code generation hands to them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import tirx as T

from cnncc.targets.devices import named, resolve_profile
from cnncc.targets.llvm.codegen import write_kernels
from cnncc.targets.llvm.loading import Loaded, load_objects
from cnncc.targets.llvm.machine import target_options
from cnncc.targets.llvm.threads.pool import SOURCE, TEXT, source_digest, write_object
from cnncc.targets.llvm.wide import wide
from cnncc_runtime.elf import parse_elf
from cnncc_runtime.engine_threads import Pool

WIDTHS = (1, 2, 8, 64)


def target_of(triple: str | None = None) -> Any:
    return tvm.target.Target(target_options(named(resolve_profile(mtriple=triple))))


# ---- its text


@pytest.mark.parametrize(("source", "text"), [(SOURCE, TEXT), (wide.SOURCE, wide.TEXT)], ids=["pool", "wide"])
def test_the_assembly_is_that_of_the_source(source: Path, text: Path) -> None:
    assert source_digest(source) in text.read_text().splitlines()[0], f"{source.name} was changed: run generate.py"


@pytest.mark.parametrize(
    ("triple", "machine", "pause"),
    [
        ("x86_64-linux-gnu", "x86_64", b"\xf3\x90"),
        ("aarch64-linux-gnu", "aarch64", b"\xdf\x3f\x03\xd5"),
        ("armv7l-linux-gnueabihf", "arm", b"\x6f\xf0\x7f\xf5"),
        ("riscv64-linux-gnu", "riscv64", b""),
    ],
)
def test_the_threads_are_assembled_for_every_machine(triple: str, machine: str, pause: bytes, tmp_path: Path) -> None:
    path = write_object(target_of(triple), tmp_path / "threads.o")
    assert [file.name for file in tmp_path.iterdir()] == ["threads.o"]
    content = path.read_bytes()
    with path.open("rb") as file:
        assert parse_elf(file, path.name).machine == machine
    assert b"cnncc_parallel_launch\0" in content
    assert pause in content
    # what libgcc or compiler-rt would have to bring: engines are linked with neither
    for helper in (b"__aeabi_idiv", b"__divsi3", b"__atomic_", b"__sync_", b"memset", b"memcpy"):
        assert helper not in content


# ---- its loops


def loaded(*functions: Any) -> Loaded:
    module = tvm.IRModule({function.attrs["global_symbol"]: function for function in functions})
    with tempfile.TemporaryDirectory() as folder:
        _kernels, objects = write_kernels(module, target_of(), Path(folder))
        return load_objects(objects)


@pytest.fixture(scope="module")
def kernels() -> Loaded:
    @T.prim_func(s_tir=True)
    def count(done: T.handle) -> None:
        T.func_attr({"global_symbol": "count"})
        n = T.int32()
        Done = T.match_buffer(done, (n,), "int32")
        for i in T.parallel(n):
            with T.sblock("count"):
                v = T.axis.spatial(n, i)
                Done[v] = Done[v] + T.int32(1)

    @T.prim_func(s_tir=True)
    def in_turn(done: T.handle) -> None:
        T.func_attr({"global_symbol": "in_turn"})
        n = T.int32()
        Done = T.match_buffer(done, (n,), "int32")
        for _ in range(50):
            for i in T.parallel(n):
                with T.sblock("double"):
                    v = T.axis.spatial(n, i)
                    Done[v] = Done[v] * T.int32(2)
            for i in T.parallel(n):
                with T.sblock("mix"):
                    v = T.axis.spatial(n, i)
                    Done[v] = Done[v] % T.int32(10007) + v

    return loaded(count, in_turn)


@pytest.fixture(scope="module")
def pools(kernels: Loaded) -> dict[int, Pool]:
    return {width: Pool(kernels.launcher, width) for width in WIDTHS}


@given(
    extent=st.one_of(st.integers(0, 130), st.integers(0, 100_000)),
    width=st.sampled_from(WIDTHS),
    calls=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_every_iteration_runs_once(
    kernels: Loaded, pools: dict[int, Pool], extent: int, width: int, calls: int
) -> None:
    done = tvm.runtime.tensor(np.zeros(extent, "int32"))
    with pools[width]:
        for _ in range(calls):
            kernels.module["count"](done)
    assert (done.numpy() == calls).all()


@pytest.mark.parametrize("extent", [2**20 - 1, 2**20, 2**20 + 1, 3_000_017])
def test_loops_longer_than_a_run_can_be_are_done_in_pieces(
    kernels: Loaded, pools: dict[int, Pool], extent: int
) -> None:
    done = tvm.runtime.tensor(np.zeros(extent, "int32"))
    with pools[8]:
        kernels.module["count"](done)
    assert (done.numpy() == 1).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_loop_sees_what_the_loop_before_it_wrote(kernels: Loaded, pools: dict[int, Pool], width: int) -> None:
    start = np.arange(97, dtype="int32")
    wanted = start.copy()
    for _ in range(50):
        wanted = wanted * 2 % 10007 + np.arange(97, dtype="int32")
    for _ in range(100):
        done = tvm.runtime.tensor(start)
        with pools[width]:
            kernels.module["in_turn"](done)
        np.testing.assert_array_equal(done.numpy(), wanted)


def test_without_a_pool_a_loop_runs_on_its_own_thread(kernels: Loaded) -> None:
    done = tvm.runtime.tensor(np.zeros(1000, "int32"))
    kernels.module["count"](done)
    assert (done.numpy() == 1).all()
