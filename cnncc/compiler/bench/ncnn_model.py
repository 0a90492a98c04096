"""Models in ncnn's form: made by pnnx, in the process that converts."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

from cnncc_runtime.errors import ModelRefused

PARAM, BIN = "model.param", "model.bin"
"""ncnn's two files: the layers, and their weights."""


def convert(source: Path, folder: Path) -> Path:
    """Make ncnn's files.

    Args:
        source: A ``.pt2`` archive, or an ``.onnx`` file. pnnx knows PyTorch's operators better: networks that it
            reads from ONNX are up to 7 % slower (DenseNet-121), and it leaves operators that ncnn lacks (ConvNeXt).
        folder: An existing folder, which only this writes to.

    Returns:
        A folder with `PARAM` and `BIN`.

    Raises:
        ModelRefused: pnnx cannot convert the model.
    """
    import pnnx

    made, work = folder / "ncnn", folder / "pnnx"
    made.mkdir()
    work.mkdir()
    arguments = _traced(source, work) if zipfile.is_zipfile(source) else _linked(source, work)
    command = [pnnx.EXEC_PATH, *arguments, "fp16=0"]  # weights stay float32
    result = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    files = {work / "model.ncnn.param": PARAM, work / "model.ncnn.bin": BIN}
    if result.returncode or not all(file.is_file() for file in files):
        said = result.stdout.decode(errors="replace").splitlines()[-3:]
        raise ModelRefused(f"pnnx, ncnn's converter, ended with exit code {result.returncode}", where=said)
    for file, name in files.items():
        file.replace(made / name)
    return made


def unknown_layers(model: Path) -> list[str]:
    """Return the kinds of layers in a converted model that ncnn does not have."""
    import ncnn

    lines = (model / PARAM).read_text().splitlines()[2:]  # a magic number and two counts come first
    kinds = {line.split()[0] for line in lines if line.strip()}
    return sorted(f"unknown layer {kind}" for kind in kinds if ncnn.layer_to_index(kind) < 0)


def _linked(source: Path, work: Path) -> list[str]:
    """Return pnnx's arguments for an ONNX file; pnnx goes by its ending, and the caller's file may have none."""
    (work / "model.onnx").symlink_to(source)
    return ["model.onnx"]


def _traced(source: Path, work: Path) -> list[str]:
    """Return pnnx's arguments for a ``.pt2`` archive, made into TorchScript of one sample at a time."""
    import torch

    program = torch.export.load(source)  # cnncc's own, from its cache: nobody else's gets here
    if program.example_inputs is None:
        raise ModelRefused("the exported program does not say what its inputs look like")
    args, kwargs = program.example_inputs
    if kwargs or not all(isinstance(value, torch.Tensor) for value in args):
        raise ModelRefused("only a network of positional tensors can be traced")
    samples: tuple[Any, ...] = tuple(value[:1] for value in args)
    with torch.no_grad():
        traced = torch.jit.trace(program.module(), samples, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, work / "model.pt")
    shapes = ",".join("[" + ",".join(map(str, value.shape)) + "]" for value in samples)
    return ["model.pt", f"inputshape={shapes}"]
