"""Operators to loop nests that our schedules know.

Each loop nest is a plain definition of the operator, right whatever schedules it; its block is marked with the kernel
that computes it fast, and weights are packed as that kernel reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import ir, relax, te, topi

from cnncc.targets.llvm.machine import Machine
from cnncc.targets.llvm.schedule.anchor import FUSES, KERNEL, PARAMETERS
from cnncc.targets.llvm.schedule.matmul import MATMUL, matmul_tile

Legalizer = Callable[[Any, Any], Any]


def legalizers(machine: Machine) -> dict[str, Legalizer]:
    """Return operator → how it becomes a loop nest, where TVM's own way is not taken."""
    return {
        "relax.take": _take,
        "relax.matmul": lambda builder, call: _matmul(builder, call, machine),
    }


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _shape(expr: Any) -> list[int]:
    return _ints(expr.ty.shape)


def _default(name: str, builder: Any, call: Any) -> Any:
    return ir.Op.get(name).get_attr("FLegalize")(builder, call)


def _take(builder: Any, call: Any) -> Any:
    """TVM's own way warns on stderr that it does not check bounds; here indices are kept inside."""
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    if str(call.attrs.mode) != "fast" or not isinstance(call.args[1].ty, relax.TensorType):
        return _default("relax.take", builder, call)
    return builder.call_te(topi.take, call.args[0], call.args[1], axis, mode="clip", primfunc_name_hint="take")


def _matmul(builder: Any, call: Any, machine: Machine) -> Any:
    left, right = call.args
    dtypes = {str(tensor.ty.dtype) for tensor in (left, right, call)}
    if len(dtypes) > 1 or not machine.computes(str(call.ty.dtype)) or len(_shape(left)) < 2 or len(_shape(right)) < 2:
        return _default("relax.matmul", builder, call)
    machine = machine.of(str(call.ty.dtype))
    shape = _shape(call)
    height, width, depth = shape[-2], shape[-1], _shape(left)[-1]
    rows, vectors = matmul_tile(height, width, machine)
    columns = vectors * machine.lanes
    packed = isinstance(right, ir.GenericConst) and len(_shape(right)) == 2
    if depth == 0 or (not packed and width < columns):
        return _default("relax.matmul", builder, call)
    if packed:
        right = relax.const(_packed_right(right.value.numpy(), columns))

    def define(a: Any, b: Any) -> Any:
        k = te.reduce_axis((0, depth), "k")

        def element(*place: Any) -> Any:
            *outer, row, column = place
            other = b[column // columns, k, column % columns] if packed else b(*_aligned(b, outer), k, column)
            return te.sum(a(*_aligned(a, outer), row, k) * other, axis=[k])

        notes = {KERNEL: MATMUL, PARAMETERS: [rows, vectors, depth, int(packed)]}
        return te.compute(shape, element, name="matmul", attrs=notes)

    return builder.call_te(define, left, right, primfunc_name_hint="matmul", primfunc_attrs=FUSES)


def _aligned(operand: Any, outer: Sequence[Any]) -> list[Any]:
    sizes = _ints(operand.shape)[:-2]
    places = outer[len(outer) - len(sizes) :]
    return [0 if size == 1 else place for size, place in zip(sizes, places, strict=True)]


def _packed_right(weight: NDArray[Any], columns: int) -> NDArray[Any]:
    """Return a matrix ``[k, n]`` as ``[block of columns, k, column]``, zero-padded."""
    depth, width = weight.shape
    blocks = -(-width // columns)
    full = np.zeros((depth, blocks * columns), weight.dtype)
    full[:, :width] = weight
    return np.ascontiguousarray(full.reshape(depth, blocks, columns).transpose(1, 0, 2))
