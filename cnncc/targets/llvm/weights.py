"""Weights apart from the code: constants become parameters of the entries, their bytes a file that runtimes map.

Left in the program they would lie in the shared library, and TVM's virtual machine would copy them three times while
it loads: a network would need four times the memory of its weights, and no two processes could share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import ir, relax

from cnncc.targets.llvm.expansions import Expanded, Expansions, Key, key_of
from cnncc_runtime.specs import DTYPES
from cnncc_runtime.weights import ALIGNMENT, Expansion, WeightRecord, WeightsRecord

WEIGHTS = "weights.bin"

LEAST = 1024
"""Bytes from which a constant leaves the program: a parameter costs 0.1 µs a call, which small ones do not repay."""


@dataclass(frozen=True)
class Weights:
    """The constants that entries take as parameters.

    Attributes:
        tensors: Row-major arrays of one of `cnncc_runtime.specs.DTYPES`; no two are equal.
        entries: Entry → positions in ``tensors``, in the order of the parameters after the inputs.
        expanded: Position in ``tensors`` → what the file holds in its place.
    """

    tensors: tuple[NDArray[Any], ...]
    entries: Mapping[str, tuple[int, ...]]
    expanded: Mapping[int, Expanded] = field(default_factory=dict)

    def of(self, entry: str) -> list[NDArray[Any]]:
        """Return what an entry takes after its inputs."""
        return [self.tensors[position] for position in self.entries[entry]]


def separate(module: Any, entries: Sequence[str], expansions: Expansions) -> tuple[Any, Weights]:
    """Make large constants parameters.

    Run it last: parameters that the lowering passes see get a check of type and shape in every call, and the kernels
    check both anyway.

    Args:
        module: Relax functions in the virtual machine's form, and kernels.
        entries: Names of the Relax functions.
        expansions: Which constants are made when the engine first runs.

    Returns:
        The module, whose entries take the constants after their inputs in the order of first use, and the constants;
        equal ones of all entries are one.
    """
    found = _Found(expansions)
    order = {}
    for entry in entries:
        var = module.get_global_var(entry)
        function, order[entry] = _parametrized(module[var], found)
        module.update_func(var, function)
    return module, Weights(tuple(found.tensors), order, found.expanded)


class _Found:
    """Constants met so far."""

    def __init__(self, expansions: Expansions) -> None:
        self.tensors: list[NDArray[Any]] = []
        self.expanded: dict[int, Expanded] = {}
        self._expansions = expansions
        self._positions: dict[Key, int] = {}

    def position(self, array: NDArray[Any]) -> int:
        """Return where an array stands among the tensors; it is added where no equal one is there."""
        key = key_of(array)
        if key not in self._positions:
            self._positions[key] = len(self.tensors)
            if (expanded := self._expansions.find(key)) is not None:
                self.expanded[len(self.tensors)] = expanded
            self.tensors.append(array)
        return self._positions[key]


def _parametrized(function: Any, found: _Found) -> tuple[Any, tuple[int, ...]]:
    """Return the function with parameters for constants, and which tensors they are."""
    params: dict[int, Any] = {}

    def replaced(constant: Any) -> Any:
        array = _array(constant)
        if array is None:
            return constant
        position = found.position(array)
        if position not in params:
            params[position] = relax.Var(f"weight{position}", constant.ty)
        return params[position]

    body = tvm_ffi.structural_map(function.body, [(ir.GenericConst, replaced)], order="post")
    made = relax.Function(
        [*function.params, *params.values()], body, function.ret_ty, function.is_pure, function.attrs, function.span
    )
    return made, tuple(params)


def _array(constant: Any) -> NDArray[Any] | None:
    """Return a constant that is to leave the program, without copying it; None for what stays."""
    if not isinstance(constant.value, tvm.runtime.Tensor) or str(constant.value.dtype) not in DTYPES:
        return None
    array: NDArray[Any] = np.ascontiguousarray(np.from_dlpack(constant.value))
    return array if array.nbytes >= LEAST else None


def write_weights(weights: Weights, entries: Mapping[int, str], path: Path) -> WeightsRecord | None:
    """Write the file of weights.

    Args:
        weights: The weights.
        entries: Batch size → entry, as the engine's record has them.
        path: The file to write.

    Returns:
        What lies where; None, and no file, where there is none.
    """
    if not weights.tensors:
        return None
    matrices = {expanded.matrix.tobytes(): expanded.matrix for expanded in weights.expanded.values()}
    places = {content: len(weights.tensors) + number for number, content in enumerate(matrices)}
    records = []
    with path.open("wb") as file:
        for position, array in enumerate([*weights.tensors, *matrices.values()]):
            file.write(bytes(-file.tell() % ALIGNMENT))
            expanded = weights.expanded.get(position)
            made = Expansion(places[expanded.matrix.tobytes()], len(expanded.stored)) if expanded else None
            records.append(WeightRecord(file.tell(), array.shape, array.dtype.name, made))
            file.write((expanded.stored if expanded else array).data)
    taken = {batch: weights.entries[entry] for batch, entry in entries.items()}
    return WeightsRecord(path.name, tuple(records), taken)
