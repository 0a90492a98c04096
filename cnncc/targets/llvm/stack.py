"""Where a kernel's own buffers lie: small ones on the stack, where LLVM makes registers of them; others may share."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

_SMALL = 4096
"""Bytes of a buffer that may lie on the stack; more than any register file holds."""
_STAYS = "disable_lower_builtin"
"""TVM's annotation of an allocation that stays what it is."""


def keep_on_stack() -> Any:
    """Return a pass that keeps small buffers of the local scope on the stack.

    TVM takes them from a pool, by a call that LLVM cannot see through: every value would be written to memory, in case
    the pool reads it. Only small buffers of the global scope would stay, and those share their memory with others.
    """

    def stay(statement: Any) -> Any:
        buffer = statement.buffer
        if buffer.scope() != "local" or not 0 < _bytes(buffer) <= _SMALL:
            return statement
        return tirx.AllocBuffer(buffer, {_STAYS: tirx.IntImm("int32", 1)}, span=statement.span)

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        body = tvm_ffi.structural_map(function.body, [(tirx.AllocBuffer, stay)], order="post")
        return function.with_body(body)

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="cnncc.KeepOnStack")


def share_buffers() -> Any:
    """Return a pass that lets buffers lie in the same memory one after the other.

    TVM's pass does not see that a view reads the buffer it is of: it takes that for dead, and lays the next one over
    it. Kernels with views of buffers of their own are left alone.
    """
    rewrite = tirx.transform.StorageRewrite()

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        if _has_views(function):
            return function
        return rewrite(tvm.IRModule({"kernel": function}))["kernel"]

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="cnncc.ShareBuffers")


def _has_views(function: Any) -> bool:
    """Whether a function sees a buffer that it allocates under another shape."""
    own: list[Any] = []
    seen: list[Any] = []
    tvm_ffi.structural_walk(
        function.body,
        [
            (tirx.AllocBuffer, lambda statement: own.append(statement.buffer)),
            (tirx.DeclBuffer, lambda statement: seen.extend(getattr(statement.data, "args", ()))),
        ],
    )
    return any(buffer.same_as(whole) for buffer in own for whole in seen)


def _bytes(buffer: Any) -> int:
    """Return a buffer's size, 0 where it is not constant."""
    dtype = tvm.DataType(str(buffer.dtype))
    size = int(dtype.bits) * int(dtype.lanes) // 8
    for extent in buffer.shape:
        if not isinstance(extent, tirx.IntImm):
            return 0
        size *= int(extent)
    return size
