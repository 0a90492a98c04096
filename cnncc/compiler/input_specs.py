"""Which inputs a model takes: from the command line, from examples, or from the model's file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cnncc.compiler.model_reference import ModelRequest, parse_dtypes, parse_shapes
from cnncc_runtime.errors import ModelRefused, UsageError
from cnncc_runtime.specs import TensorSpec

_HOW = "give --input-shape 1,3,224,224 (or name=1,3,224,224), or define example_inputs() beside the factory"


def by_name(given: Mapping[str | int, object], names: Sequence[str], flag: str) -> dict[str, object]:
    """Map positions and names on the command line to input names.

    Raises:
        UsageError: A name that is not an input, more values than inputs, or an input given twice.
    """
    found: dict[str, object] = {}
    for key, value in given.items():
        name = _name_of(key, names, flag)
        if name in found:
            raise UsageError(f"{flag} gives '{name}' twice, by name and by position")
        found[name] = value
    return found


def _name_of(key: str | int, names: Sequence[str], flag: str) -> str:
    known = f"the model takes {', '.join(names) or 'no inputs'}"
    if isinstance(key, int):
        if key >= len(names):
            raise UsageError(f"{flag} is given for {key + 1} inputs, the model takes {len(names)}", hint=known)
        return names[key]
    if key not in names:
        near = difflib.get_close_matches(key, names, 1)
        hint = f"did you mean {near[0]}? {known}" if near else known
        raise UsageError(f"{flag}: the model has no input '{key}'", hint=hint)
    return key


def module_specs(
    request: ModelRequest, names: Sequence[str], required: int, known: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the inputs of a module that does not know its own shapes.

    Args:
        request: Carries the flags, which win over ``known``.
        names: Parameter names of ``forward``, in order.
        required: How many of them have no default.
        known: Inputs from ``example_inputs()`` or a model zoo, which name what is used.

    Raises:
        UsageError: A required input has no shape; says how to give it.
    """
    candidates = [spec.name for spec in known] if known else list(names)
    shapes = by_name(parse_shapes(request.input_shapes), _with(candidates, names), "--input-shape")
    dtypes = by_name(parse_dtypes(request.input_dtypes), _with(candidates, names), "--input-dtype")
    base = {spec.name: spec for spec in known}
    specs = []
    for index, name in enumerate(_with(candidates, names)):
        if name in shapes:
            shape = shapes[name]
            assert isinstance(shape, tuple)
            specs.append(
                TensorSpec(name, shape, str(dtypes.get(name, base[name].dtype if name in base else "float32")))
            )
        elif name in base:
            specs.append(replace(base[name], dtype=str(dtypes.get(name, base[name].dtype))))
        elif index < required:
            raise UsageError(f"the shape of input '{name}' is not known", hint=_HOW)
    if not specs:
        raise UsageError("the model's input shapes are not known", hint=_HOW)
    return tuple(specs)


def _with(first: Sequence[str], rest: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((*first, *rest)))


def graph_specs(request: ModelRequest, own: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the inputs of a graph that carries its own, with the flags' shapes for its symbols.

    Raises:
        UsageError: A flag names no input.
        ModelRefused: A symbolic dimension that no flag binds, or a static one asked to be another.
    """
    names = [spec.name for spec in own]
    shapes = by_name(parse_shapes(request.input_shapes), names, "--input-shape")
    dtypes = by_name(parse_dtypes(request.input_dtypes), names, "--input-dtype")
    specs = []
    for spec in own:
        if dtypes.get(spec.name, spec.dtype) != spec.dtype:
            raise ModelRefused(
                f"input '{spec.name}' is {spec.dtype} in the model, {dtypes[spec.name]} was asked",
                hint="the dtype of an exported model is fixed: export it again",
            )
        shape = shapes.get(spec.name)
        specs.append(_asked(spec, shape) if isinstance(shape, tuple) else _settled(spec))
    return tuple(specs)


def _settled(spec: TensorSpec) -> TensorSpec:
    if spec.symbols:
        sizes = ",".join(str(d) if isinstance(d, int) else "1" for d in spec.shape)
        raise ModelRefused(
            f"input '{spec.name}' has sizes left open: {spec}",
            where=[f"dimension '{symbol}'" for symbol in spec.symbols],
            hint=f"--input-shape {spec.name}={sizes}, or with N first for any batch",
        )
    return spec


def _asked(spec: TensorSpec, shape: tuple[int | str, ...]) -> TensorSpec:
    wanted = f"[{', '.join(map(str, shape))}]"
    if len(shape) != len(spec.shape):
        raise ModelRefused(
            f"input '{spec.name}' has {len(spec.shape)} dimensions, {wanted} was asked", where=[str(spec)]
        )
    for have, want in zip(spec.shape, shape, strict=True):
        if isinstance(have, int) and have != want:
            raise ModelRefused(
                f"input '{spec.name}' has a fixed size {have} where {want} was asked",
                where=[str(spec), f"asked: {wanted}"],
                hint="export the model again with that dimension left open (dynamic)",
            )
    return replace(spec, shape=shape)
