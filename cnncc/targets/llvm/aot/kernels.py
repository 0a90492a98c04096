"""Kernels as plain C functions, which need nothing else: no runtime, no threads, no memory but what they are given.

TVM's calling convention costs more code than most kernels: each checks the types and shapes of all its arguments. Here
the driver is generated together with them, so that a kernel takes addresses and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

from cnncc.targets.llvm.codegen import kernel_passes, write_module

_BUFFER_DATA = "tirx.buffer_data"
_STAYS = "disable_lower_builtin"  # what `cnncc.targets.llvm.stack` leaves on the stack
_CALLING = ("entry", "packed-calls", "announce-regions")
"""Passes of an engine that make TVM's functions and loops of them."""


def write_plain_kernels(kernels: Mapping[str, Any], target: Any, path: Path) -> tuple[Path, dict[str, list[int]]]:
    """Generate machine code for kernels.

    Args:
        kernels: Name of the C function → its scheduled function.
        target: TVM's target.
        path: The object file to write.

    Returns:
        The object, and what each function takes after its tensors: bytes of each piece of working memory.
    """
    spaces: dict[str, list[int]] = {}
    steps = [("one-thread", _one_thread()), *kernel_passes()]
    at = [name for name, _step in steps].index("packed-calls")
    steps.insert(at, ("plain-calls", _plain_calls(spaces)))
    passes = [step for name, step in steps if name not in _CALLING]
    named = {name: function.with_attr("global_symbol", name) for name, function in kernels.items()}
    return write_module(tvm.IRModule(named), passes, target, path), spaces


def _one_thread() -> Any:
    """Return a pass that makes loops of parallel ones: whoever calls runs them."""

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        kind = tirx.ForKind.SERIAL
        return tirx.For(loop.loop_var, loop.min, loop.extent, kind, loop.body, None, loop.annotations, span=loop.span)

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(tvm_ffi.structural_map(function.body, [(tirx.For, serial)], order="post"))

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="cnncc.OneThread")


def _plain_calls(spaces: dict[str, list[int]]) -> Any:
    """Return a pass that makes kernels take addresses: of their tensors, then of their working memory.

    Args:
        spaces: Is told the bytes of each kernel's working memory.
    """

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        pointers = {param: _pointer(str(param.name), _element(param.ty.dtype)) for param in function.params}
        found: list[tuple[Any, int]] = []

        def address(call: Any) -> Any:
            is_data = isinstance(call.op, ir.Op) and str(call.op.name) == _BUFFER_DATA
            return pointers.get(call.args[0], call) if is_data else call

        def given(statement: Any) -> Any:
            buffer = statement.buffer
            if _STAYS in statement.annotations:
                return statement
            pointer = _pointer(f"{buffer.name}_space", _element(buffer.dtype))
            found.append((pointer, _bytes(buffer)))
            return tirx.DeclBuffer(buffer, data=pointer, span=statement.span)

        body = tvm_ffi.structural_map(function.body, [(ir.Call, address), (tirx.AllocBuffer, given)], order="post")
        spaces[str(function.attrs["global_symbol"])] = [size for _pointer, size in found]
        params = [*pointers.values(), *(pointer for pointer, _size in found)]
        return tirx.PrimFunc(params, body, function.ret_type, function.attrs, function.span)

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="cnncc.PlainCalls")


def _pointer(name: str, element: str) -> Any:
    return tirx.Var(name, ir.PointerType(ir.PrimType(element)))


def _element(dtype: Any) -> str:
    return str(dtype)


def _bytes(buffer: Any) -> int:
    """Return a buffer's size; shapes are static here."""
    dtype = tvm.DataType(str(buffer.dtype))
    bits = int(dtype.bits) * int(dtype.lanes)
    return -(-bits // 8) * math.prod(int(extent) for extent in buffer.shape)
