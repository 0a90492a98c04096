"""Small buffers stay on the stack."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import te, tirx

from cnncc.targets.llvm.codegen import kernel_passes
from cnncc.targets.llvm.schedule import tir


def annotations_of(elements: int, scope: str) -> list[bool]:
    """Return, for each allocation of a kernel that uses a buffer in a parallel loop, whether it stays as it is."""
    source = te.placeholder((64,), name="source")
    like = te.create_prim_func([source, te.compute((64,), lambda i: source[i])])
    read, write = like.params
    held = tir.buffer([elements], "held", scope=scope)

    def task(number: object) -> object:
        fill = tir.loop(elements, lambda i: tir.store(held, [i], read[number]))
        take = tir.store(write, [number], held[number % elements])
        return tir.block(tir.sequence([fill, take]), [held])

    module = tvm.IRModule({"main": tir.function(like, tir.parallel(64, task))})
    for name, step in kernel_passes():
        if name == "unroll":
            break
        module = step(module)
    found: list[bool] = []
    stays = "disable_lower_builtin"
    tvm_ffi.structural_walk(
        module["main"].body, [(tirx.AllocBuffer, lambda node: found.append(stays in node.annotations))]
    )
    return found


def test_a_small_local_buffer_stays() -> None:
    assert annotations_of(32, "local") == [True]


def test_a_large_buffer_and_a_shared_one_come_from_the_pool() -> None:
    assert annotations_of(4096, "local") == [False]
    assert annotations_of(32, "global") == [False]
