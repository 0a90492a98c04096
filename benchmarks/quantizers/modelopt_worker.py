"""Quantizes with NVIDIA's ModelOpt: ``python modelopt_worker.py FP32.onnx CALIB.npz INT8.onnx METHOD``.

METHOD is entropy or max. What is not quantized stays fp32. Calibration runs in batches: for a batch of one the library
takes the last layer for a product of a matrix and a vector, and leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort
from modelopt.onnx.quantization import quantize

BATCH = 16
"""Images that the calibrator runs at a time."""


def main() -> None:
    """Quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("int8")
    parser.add_argument("method", choices=["entropy", "max"])
    args = parser.parse_args()
    name = ort.InferenceSession(args.fp32, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with np.load(args.calibration) as held:
        x = held["x"][: max(BATCH, len(held["x"]) // BATCH * BATCH)]
    shape = "x".join(str(size) for size in (min(BATCH, len(x)), *x.shape[1:]))
    quantize(
        args.fp32,
        quantize_mode="int8",
        calibration_data={name: x},
        calibration_method=args.method,
        calibration_shapes=f"{name}:{shape}",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=args.int8,
    )


if __name__ == "__main__":
    main()
