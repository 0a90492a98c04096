"""Runs a graph's kernels, one after the other, on a machine that qemu emulates, by `kernels.c`: no library of TVM is
needed there. What TVM's virtual machine would do is done here: the program is read, and its calls are listed."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import ir, relax

from cnncc.graph.onnx_graph import OnnxGraph
from cnncc.targets.base import Profile
from cnncc.targets.devices import find_device, machine_name
from cnncc.targets.devices.profile_files import Device
from cnncc.targets.llvm import codegen, pipeline
from cnncc.targets.llvm.blocked.methods import KernelPolicy
from cnncc.targets.llvm.expansions import Expansions
from cnncc.targets.llvm.importer import import_graph
from cnncc.targets.llvm.layers import bindings_of
from cnncc.targets.llvm.link import find_linker, link
from cnncc.targets.llvm.machine import machine_of, target_options
from cnncc.targets.llvm.plans import Plans
from cnncc.targets.llvm.quiet import quiet
from cnncc.targets.llvm.schedule.driver import schedule
from cnncc.targets.llvm.schedule.rules import RULES

PREFIXES = {"aarch64": "aarch64-linux-gnu", "arm": "arm-linux-gnueabihf", "riscv64": "riscv64-linux-gnu"}
"""ELF machine → what its GNU tools begin with, and where Debian puts its C library."""
_THREADS = 2
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLPack's type codes


@dataclass
class Program:
    """Tensors and calls.

    Attributes:
        tensors: Each tensor's bytes as `kernels.c` reads them.
        calls: Kernel and the places of its arguments.
    """

    tensors: list[bytes] = field(default_factory=list)
    calls: list[tuple[str, list[int]]] = field(default_factory=list)

    def tensor(self, shape: list[int], dtype: str, data: bytes = b"", shared: int = -1) -> int:
        """Add a tensor and return its place."""
        kind = np.dtype(dtype)
        head = [_CODES[kind.kind], 8 * kind.itemsize, shared, len(data), len(shape), *shape]
        self.tensors.append(np.array(head, "<i8").tobytes() + data)
        return len(self.tensors) - 1

    def array(self, array: NDArray[Any]) -> int:
        """Add a tensor that is given, and return its place."""
        return self.tensor(list(array.shape), str(array.dtype), np.ascontiguousarray(array).tobytes())

    def content(self, results: list[int]) -> bytes:
        """Return the file."""
        parts = [_ints(len(self.tensors)), *self.tensors, _ints(len(self.calls))]
        for name, places in self.calls:
            symbol = f"__tvm_ffi_{name}".encode()
            parts += [_ints(len(symbol)), symbol, _ints(len(places), *places)]
        return b"".join([*parts, _ints(len(results), *results)])


def _ints(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


@dataclass(frozen=True)
class Bare:
    """A machine that qemu emulates, with nothing of TVM on it.

    Attributes:
        folder: Holds the runner, and files of a run meanwhile.
        device: What it stands for.
    """

    folder: Path
    device: Device

    def run(self, graph: OnnxGraph, feeds: Mapping[str, NDArray[Any]], profile: Profile | None = None) -> list[Any]:
        """Compile a graph's kernels as a build would, and run them on two threads.

        Args:
            graph: Of static shapes.
            feeds: Its inputs.
            profile: What to compile for, if not for the device.

        Returns:
            The outputs.
        """
        chosen = profile or self.device.profile
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            module, library = self.compiled(graph, chosen)
        program = Program()
        known: dict[Any, Any] = {}
        main = module["main"]
        for parameter, spec in zip(main.params, graph.inputs, strict=True):
            known[parameter] = program.array(feeds[spec.name])
        for binding in bindings_of(main):
            known[binding.var] = _evaluate(program, known, binding.value)
        found = _place(program, known, main.body.body)
        places = found if isinstance(found, list) else [found]
        return self._execute(library, program, places, _types(main.ret_ty))

    def compiled(self, graph: OnnxGraph, profile: Profile) -> tuple[Any, Path]:
        """Return a graph's program, its kernels scheduled, and their library."""
        machine, target = machine_of(profile), tvm.target.Target(target_options(profile))
        layout = pipeline.layout_passes(Plans(machine), {"main": KernelPolicy()}, Expansions())
        passes = (pipeline.simplify_passes(), layout, pipeline.legalize_passes(machine), pipeline.fuse_passes(),
                  pipeline.merge_passes())  # fmt: skip
        with target, tvm.transform.PassContext(opt_level=3):
            module = import_graph(graph, "main")
            for some in passes:
                module = pipeline.run(module, some)
            module, _ = schedule(module, RULES, machine, lambda _fraction: None)
            _, objects = codegen.write_kernels(module, target, self.folder)
        library, elf = self.folder / "kernels.so", machine_name(profile.triple)
        link(find_linker(elf, "x86_64"), elf, objects, library)
        return module, library

    def _execute(self, library: Path, program: Program, places: list[int], types: list[Any]) -> list[NDArray[Any]]:
        emulator = self.device.emulator
        assert emulator is not None
        given, made = self.folder / "program", self.folder / "output"
        given.write_bytes(program.content(places))
        root = f"/usr/{PREFIXES[machine_name(self.device.profile.triple)]}"
        command = [emulator.binary, "-cpu", emulator.cpu, "-L", root, self.folder / "kernels", library, str(_THREADS)]
        done = subprocess.run([*command, given, made], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
        content, results, start = made.read_bytes(), [], 0
        for kind in types:
            shape, dtype = [int(size) for size in kind.shape.values], np.dtype(str(kind.dtype))
            count = int(np.prod(shape))
            results.append(np.frombuffer(content, dtype, count, start).reshape(shape))
            start += count * dtype.itemsize
        assert start == len(content)
        return results


def make_bare(folder: Path, name: str) -> Bare:
    """Return the machine of a device; skip the test where it cannot be emulated, but in CI fail it."""
    import tvm_ffi.libinfo

    device = find_device(name)
    prefix = PREFIXES[machine_name(device.profile.triple)]
    assert device.emulator is not None
    tools = (device.emulator.binary, f"{prefix}-gcc", f"{prefix}-objdump")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        problem = f"{', '.join(missing)} not found: `make aarch64` brings them"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    source = Path(__file__).with_name("kernels.c")
    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-rdynamic", "-I", tvm_ffi.libinfo.find_include_path()]
    libraries = ["-Wl,--no-as-needed", "-lm", "-ldl", "-lpthread"]
    subprocess.run([f"{prefix}-gcc", *options, str(source), "-o", str(folder / "kernels"), *libraries], check=True)
    return Bare(folder, device)


def _evaluate(program: Program, known: dict[Any, Any], value: Any) -> Any:
    """Add what a binding computes to the program; return the place of its result, or those of a tuple."""
    if not isinstance(value, ir.Call):
        return _place(program, known, value)
    operator = str(getattr(value.op, "name", value.op))
    if operator == "relax.reshape":
        [shape] = [value.ty.shape]
        source = _place(program, known, value.args[0])
        return program.tensor([int(size) for size in shape.values], str(value.ty.dtype), shared=source)
    assert operator == "relax.call_tir", f"{operator}: only TVM's virtual machine does that"
    kernel, arguments = value.args[:2]
    places = [_place(program, known, argument) for argument in arguments.fields]
    results = [program.tensor([int(size) for size in kind.shape.values], str(kind.dtype)) for kind in _types(value.ty)]
    program.calls.append((str(kernel.name_hint), places + results))
    return results if isinstance(value.ty, relax.TupleType) else results[0]


def _place(program: Program, known: dict[Any, Any], value: Any) -> Any:
    if isinstance(value, relax.Tuple):
        return [_place(program, known, item) for item in value.fields]
    if isinstance(value, relax.TupleGetItem):
        return _place(program, known, value.tuple_value)[value.index]
    if value in known:
        return known[value]
    assert isinstance(value, ir.GenericConst), f"{type(value)}: only TVM's virtual machine knows such a value"
    known[value] = program.array(value.value.numpy())
    return known[value]


def _types(kind: Any) -> list[Any]:
    return list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
