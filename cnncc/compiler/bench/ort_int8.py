"""ONNX Runtime's own int8: its static quantization, in the process that converts.

ONNX Runtime multiplies int8 only what is quantized after its own rules, u8 and biases included. A Q/DQ model made for
all targets (docs/qdq.md) it computes in float32 for the most part. So what its user would have is made here: by its own
tool, of the float model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cnncc.compiler.bench import requantized
from cnncc.compiler.bench.float_model import float_model
from cnncc.graph.reader import read_onnx
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.specs import Tensors


def convert(source: Path, folder: Path) -> Path:
    """Make a quantized ``.onnx`` file.

    Args:
        source: An ``.onnx`` file, in float32 or with Q/DQ, which is taken out first.
        folder: An existing folder, which only this writes to.

    Raises:
        ModelRefused: The file cannot be read, or what came out computes something else.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    logging.disable(logging.WARNING)  # it advises to optimize the model first: a cleaned graph is
    graph = float_model(read_onnx(source))
    samples = requantized.samples(graph.inputs)
    plain, made = folder / "float.onnx", folder / "int8.onnx"
    plain.write_bytes(graph.serialized)
    quantize_static(
        str(plain),
        str(made),
        _Reader(iter(samples)),
        quant_format=QuantFormat.QDQ,  # QOperator gives the same kernels once the session has fused them
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=saturates(host_cpu().machine, host_cpu().features),
    )
    requantized.check(_run(plain, samples[0]), _run(made, samples[0]), "ONNX Runtime")
    plain.unlink()
    return made


def saturates(machine: str, features: Iterable[str]) -> bool:
    """Whether its kernels for u8 and s8 add pairs of products in int16, which overflows unless weights have 7 bits.

    Args:
        machine: As `cnncc_runtime.cpu.HostCpu.machine`.
        features: LLVM's names.
    """
    return machine == "x86_64" and not {"avx512vnni", "avxvnni"}.intersection(features)


class _Reader:
    """Gives the quantizer its inputs, one after the other."""

    def __init__(self, left: Iterator[Tensors]) -> None:
        self._left = left

    def get_next(self) -> Tensors | None:
        """Return the next inputs by name, or None at the end."""
        return next(self._left, None)


def _run(path: Path, feeds: Tensors) -> list[NDArray[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))
