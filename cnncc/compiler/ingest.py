"""MODEL → `Model`: the user's module, archive or graph, with everything known about its inputs."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cnncc.compiler.input_specs import graph_specs, module_specs
from cnncc.compiler.model_reference import BATCH, ModelReference, ModelRequest, parse_reference
from cnncc.graph.onnx_graph import OnnxGraph
from cnncc_runtime.digests import digest_array, digest_file, digest_json
from cnncc_runtime.errors import ModelRefused, UsageError
from cnncc_runtime.preprocess import Preprocessing
from cnncc_runtime.specs import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from cnncc.compiler.factory import Built

_RANDOM_WEIGHTS = (
    "no weights were given: the model has the values that its factory set (random ones are drawn with seed 0)"
)


@dataclass(frozen=True, eq=False)
class Model:
    """A model as the user gave it. One of ``module``, ``program`` and ``graph`` is there.

    Attributes:
        name: Short name.
        source: MODEL as given, without folders.
        inputs: What it takes; dimension 0 may be symbolic (``"N"``).
        digest: Over weights, structure and inputs; empty where ``graph`` is there, which has one.
        module: From a factory or a zoo: in eval mode, on the CPU.
        program: From a ``.pt2`` archive.
        graph: From an ``.onnx`` file.
        preprocessing: The contract that stands beside the factory, or the zoo's.
        labels: Class names, likewise.
        dependencies: Files whose content determined the model.
        notes: For the user to read.
    """

    name: str
    source: str
    inputs: tuple[TensorSpec, ...]
    digest: str
    module: nn.Module | None = None
    program: ExportedProgram | None = None
    graph: OnnxGraph | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    dependencies: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def ingest(request: ModelRequest) -> Model:
    """Read a model.

    Args:
        request: MODEL, its weights and the input flags.

    Returns:
        The model; nothing was exported yet.

    Raises:
        UsageError: MODEL or a flag is wrong, or an input's shape is not known.
        ModelRefused: The model cannot be read, or its code fails.
        WeightsRefused: The weights are unsafe, damaged, do not fit, or hold NaN or Inf.
        UnsupportedGraph: An ONNX file holds custom operators; lists every one.
        DependencyMissing: A model zoo is not installed.
    """
    reference = parse_reference(request.reference)
    if request.weights is not None and reference.kind in ("pt2", "onnx"):
        raise UsageError(f"--weights does not go with {reference.label}", hint="the file carries its own weights")
    readers = {"file": _from_factory, "module": _from_factory, "pt2": _from_archive, "onnx": _from_onnx}
    return readers.get(reference.kind, _from_zoo)(reference, request)


def _from_factory(reference: ModelReference, request: ModelRequest) -> Model:
    from cnncc.compiler import factory

    built = factory.build(reference)
    names, required = forward_parameters(built.module)
    inputs = module_specs(request, names, required, _example_specs(built, names))
    model = Model(
        name=reference.name,
        source=reference.label,
        inputs=inputs,
        digest="",
        module=built.module,
        preprocessing=built.preprocessing,
        labels=built.labels,
        dependencies=built.dependencies,
    )
    return _with_weights(model, request)


def _from_zoo(reference: ModelReference, request: ModelRequest) -> Model:
    from cnncc.compiler import zoo

    built = zoo.build(reference.kind, reference.target)
    names, required = forward_parameters(built.module)
    known = (TensorSpec(names[0], built.shape),) if built.shape and names else ()
    inputs = module_specs(request, names, required, known)
    preprocessing = built.preprocessing
    if preprocessing is not None and inputs[0].shape[2:] != preprocessing.size:
        preprocessing = None  # asked for another size: the zoo's contract does not hold
    model = Model(
        name=reference.name,
        source=reference.label,
        inputs=inputs,
        digest="",
        module=built.module,
        preprocessing=preprocessing,
        labels=built.labels,
    )
    return _with_weights(model, request)


def _with_weights(model: Model, request: ModelRequest) -> Model:
    from cnncc.compiler.weights import check_finite, load_weights

    module = model.module
    assert module is not None
    notes: tuple[str, ...] = (_RANDOM_WEIGHTS,)
    dependencies = model.dependencies
    if request.weights is not None:
        notes = load_weights(module, request.weights)
        dependencies = tuple(sorted({*dependencies, request.weights.resolve()}))
    check_finite(module.named_parameters(), module.named_buffers())
    _check_symbols(model.inputs)
    model = replace(model, dependencies=dependencies, notes=notes)
    return replace(model, digest=_module_digest(model, module))


def _check_symbols(inputs: tuple[TensorSpec, ...]) -> None:
    for spec in inputs:
        if spec.dtype not in DTYPES:
            raise UsageError(f"input '{spec.name}' has dtype {spec.dtype}", hint=f"cnncc takes {', '.join(DTYPES)}")


def forward_parameters(module: nn.Module) -> tuple[list[str], int]:
    """Return the parameter names of ``forward`` and how many of them have no default.

    ``*args`` gives no names; such a module is fed by position as ``input_0``, ``input_1``, …
    """
    names: list[str] = []
    required = 0
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"input_{index}" for index in range(len(names), 8)]
        elif parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
            required += parameter.default is parameter.empty
    return names, required


def _example_specs(built: Built, names: list[str]) -> tuple[TensorSpec, ...]:
    if built.examples is None:
        return ()
    if isinstance(built.examples, tuple):
        if len(built.examples) > len(names):
            raise ModelRefused(
                f"example_inputs() returned {len(built.examples)} tensors, forward takes {len(names)}",
                hint=f"forward takes {', '.join(names)}",
            )
        pairs = dict(zip(names, built.examples, strict=False))
    else:
        pairs = built.examples
    if unknown := [name for name in pairs if name not in names]:
        raise ModelRefused(
            f"example_inputs() names {', '.join(unknown)}, which forward does not take",
            hint=f"forward takes {', '.join(names)}",
        )
    return tuple(_tensor_spec(name, tensor) for name, tensor in pairs.items())


def _tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelRefused(f"input '{name}' has dtype {dtype}", hint=f"cnncc takes {', '.join(DTYPES)}")
    return TensorSpec(name, tuple(tensor.shape), dtype)


def _module_digest(model: Model, module: nn.Module) -> str:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return digest_json(
        {
            "source": model.source,
            # an object's address in a repr would change with every run
            "structure": re.sub(r"0x[0-9a-f]+", "0x", repr(module)),
            "code": [digest_file(path) for path in model.dependencies],
            "weights": {name: digest_array(_as_array(tensor)) for name, tensor in tensors},
            "inputs": [str(spec) for spec in model.inputs],
        }
    )


def _as_array(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    import torch

    tensor = tensor.detach().contiguous()
    try:
        return tensor.numpy()
    except TypeError:  # a dtype that NumPy lacks: bfloat16
        return tensor.reshape(-1).view(torch.uint8).numpy()


def _from_archive(reference: ModelReference, request: ModelRequest) -> Model:
    from cnncc.compiler.archive import load_archive, program_inputs
    from cnncc.compiler.weights import check_finite

    assert reference.path is not None
    program = load_archive(reference.path)
    check_finite(program.named_parameters(), program.named_buffers())
    inputs = graph_specs(request, program_inputs(program))
    return Model(
        name=reference.name,
        source=reference.label,
        inputs=inputs,
        digest=digest_json([digest_file(reference.path), *(str(spec) for spec in inputs)]),
        program=program,
        dependencies=(reference.path.resolve(),),
    )


def _from_onnx(reference: ModelReference, request: ModelRequest) -> Model:
    from cnncc.graph.reader import bind_shapes, external_files, read_onnx

    assert reference.path is not None
    graph = read_onnx(reference.path)
    inputs = graph_specs(request, graph.inputs)
    graph = bind_shapes(graph, inputs)
    return Model(
        name=reference.name,
        source=reference.label,
        inputs=graph.inputs,
        digest="",
        graph=graph,
        dependencies=tuple(sorted({reference.path.resolve(), *external_files(reference.path)})),
    )


def is_dynamic(inputs: tuple[TensorSpec, ...]) -> bool:
    """Say whether the batch is symbolic."""
    return any(BATCH in spec.symbols for spec in inputs)
