"""Quantizes with NNCF's performance preset: ``python nncf_worker.py FP32.onnx CALIB.npz INT8.onnx [--signed]``.

The preset takes u8 with a zero point of 0 for what is never negative, and halves the first layer's range for the sake
of old CPUs. NNCF has no switch for s8 alone, so ``--signed`` turns its u8 ranges into s8 ones of the same end, as
TensorRT needs them, and leaves the first layer its whole range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nncf
import numpy as np
import onnx
from nncf.quantization.advanced_parameters import OverflowFix
from onnx import TensorProto, numpy_helper


def main() -> None:
    """Quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("int8")
    parser.add_argument("--signed", action="store_true")
    args = parser.parse_args()
    model = onnx.load(args.fp32)
    name = model.graph.input[0].name
    with np.load(args.calibration) as held:
        x = held["x"]
    advanced = nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE) if args.signed else None
    made = nncf.quantize(
        model,
        nncf.Dataset([x[index : index + 1] for index in range(len(x))], lambda image: {name: image}),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(x),
        advanced_parameters=advanced,
    )
    if args.signed:
        sign(made)
    onnx.save(made, args.int8)


def sign(model: onnx.ModelProto) -> None:
    """Turn every u8 quantizer with a zero point of 0 into an s8 one for the same largest value, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    done = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        point = numpy_helper.to_array(zero)
        if point.dtype != np.uint8 or zero.name in done:
            continue
        if point.any():
            raise SystemExit(f"{node.name} has zero points: not NNCF's performance preset")
        done.add(zero.name)
        zero.CopyFrom(numpy_helper.from_array(point.astype(np.int8), zero.name))
        wider = numpy_helper.to_array(scale) * np.float32(255 / 127)
        scale.CopyFrom(numpy_helper.from_array(wider.astype(np.float32), scale.name))
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            value.type.tensor_type.elem_type = TensorProto.INT8


if __name__ == "__main__":
    main()
