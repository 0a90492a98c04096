"""A Relax function as a list of kernel calls on numbered buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import ir, relax, tirx

from cnncc.targets.llvm.aot.arena import Arena, Lifetime, plan_arena
from cnncc.targets.llvm.layers import bindings_of
from cnncc_runtime.errors import BuildFailed
from cnncc_runtime.specs import DTYPES

_CALL_TIR = "relax.call_tir"
_VIEWS = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset", "relax.expand_dims", "relax.squeeze")
"""Operators that give the same bytes another shape; what is left of them after legalization does nothing else."""


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        kernel: The function.
        reads: Buffers that it reads, in the order in which it takes them.
        writes: Buffers that it writes; it takes them after those.
    """

    kernel: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a network does.

    Attributes:
        sizes: Bytes of every buffer.
        inputs: Buffers of the inputs.
        outputs: Buffers of what it returns; one may be there twice, and be an input or a constant.
        constants: Buffers of the constants.
        steps: Kernel calls, in order.
    """

    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, NDArray[Any]]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Layout:
    """Where a program's buffers lie.

    Attributes:
        arena: Bytes of the arena.
        offsets: Buffer → where it lies in the arena.
        spaces: Step → where each piece of its working memory lies in the arena.
        direct: Buffer → the output that it is written to.
        copies: Output → the buffer that is copied to it at the end.
    """

    arena: int
    offsets: Mapping[int, int]
    spaces: tuple[tuple[int, ...], ...]
    direct: Mapping[int, int]
    copies: Mapping[int, int]


def lay_out(program: Program, spaces: Mapping[str, list[int]]) -> Layout:
    """Return a place for every buffer.

    Args:
        program: The program.
        spaces: Kernel → bytes of each piece of its working memory.
    """
    written = {buffer: at for at, step in enumerate(program.steps) for buffer in step.writes}
    direct: dict[int, int] = {}
    for output, buffer in enumerate(program.outputs):
        if buffer in written:
            direct.setdefault(buffer, output)
    copies = {at: buffer for at, buffer in enumerate(program.outputs) if direct.get(buffer) != at}
    last = {buffer: at for at, step in enumerate(program.steps) for buffer in (*step.writes, *step.reads)}
    held = [buffer for buffer in written if buffer not in direct]
    needed = [Lifetime(program.sizes[buffer], written[buffer], last[buffer]) for buffer in held]
    working = [Lifetime(size, at, at) for at, step in enumerate(program.steps) for size in spaces[step.kernel]]
    arena: Arena = plan_arena([*needed, *working])
    rest = iter(arena.offsets[len(held) :])
    places = tuple(tuple(next(rest) for _ in spaces[step.kernel]) for step in program.steps)
    return Layout(arena.size, dict(zip(held, arena.offsets, strict=False)), places, direct, copies)


def program_of(function: Any) -> Program:
    """Read a function after its kernels are made and before the virtual machine's passes.

    Raises:
        BuildFailed: It does something else than call kernels.
    """
    reader = _Reader()
    for param in function.params:
        reader.known[param] = reader.buffer(param.ty)
    inputs = tuple(reader.known[param] for param in function.params)
    for binding in bindings_of(function):
        reader.read(binding)
    returned = reader.value(function.body.body)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return Program(tuple(reader.sizes), inputs, outputs, reader.constants, tuple(reader.steps))


@dataclass
class _Reader:
    """What was read so far."""

    sizes: list[int] = field(default_factory=list)
    constants: dict[int, NDArray[Any]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    known: dict[Any, Any] = field(default_factory=dict)
    _places: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def buffer(self, type_: Any) -> int:
        if not isinstance(type_, relax.TensorType) or not isinstance(type_.shape, relax.ShapeExpr):
            raise _strange(f"a value of type {type_}")
        extents = list(type_.shape.values)
        if str(type_.dtype) not in DTYPES or not all(isinstance(extent, (int, tirx.IntImm)) for extent in extents):
            raise _strange(f"a tensor of type {type_}")
        self.sizes.append(math.prod(int(extent) for extent in extents) * np.dtype(str(type_.dtype)).itemsize)
        return len(self.sizes) - 1

    def read(self, binding: Any) -> None:
        value = binding.value
        if not isinstance(value, ir.Call):
            self.known[binding.var] = self.value(value)
            return
        name = str(getattr(value.op, "name", value.op))
        if name in _VIEWS:
            self.known[binding.var] = self.value(value.args[0])
        elif name == _CALL_TIR:
            self.known[binding.var] = self._call(value, binding.var.ty)
        else:
            raise _strange(f"a call of {name}")

    def value(self, expr: Any) -> Any:
        """Return the buffer of a tensor; of a tuple, a tuple."""
        if isinstance(expr, ir.GenericConst):
            return self._constant(expr)
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(item) for item in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if expr in self.known:
            return self.known[expr]
        raise _strange(f"the expression {str(expr)[:80]}")

    def _call(self, call: Any, type_: Any) -> Any:
        if len(call.args) > 2:
            raise _strange("a kernel that takes sizes")
        reads = self.value(call.args[1])
        several = isinstance(type_, relax.TupleType)
        writes = tuple(self.buffer(item) for item in (type_.fields if several else [type_]))
        self.steps.append(Step(str(call.args[0].name_hint), reads, writes))
        return writes if several else writes[0]

    def _constant(self, constant: Any) -> int:
        if not isinstance(constant.value, tvm.runtime.Tensor):
            raise _strange("a constant that is no tensor")
        array = np.ascontiguousarray(np.from_dlpack(constant.value))
        key = (array.dtype.name, array.tobytes())
        if key not in self._places:
            self._places[key] = self.buffer(constant.ty)
            self.constants[self._places[key]] = array
        return self._places[key]


def _strange(what: str) -> BuildFailed:
    return BuildFailed(
        f"an engine without the virtual machine cannot do all that this model needs: {what}",
        hint="leave --runtime out, and report it with the model",
    )
