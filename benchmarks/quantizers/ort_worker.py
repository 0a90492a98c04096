"""Quantizes with ONNX Runtime: ``python ort_worker.py FP32.onnx CALIB.npz INT8.onnx METHOD [OPTION…]``.

METHOD is MinMax, Percentile, Entropy or Distribution. Weights are s8 per channel; activations s8 and symmetric, or u8
and asymmetric with ``--unsigned``, which is the library's default. ``--lean`` quantizes what convolutions and matrix
products read and nothing else, in place of all that the library can. ``--ranges`` ends when every tensor has its range.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)

BATCH = 4
"""Images that the calibrator runs at a time."""

LEAN = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


class Reader(CalibrationDataReader):
    """Gives the calibrator its images, a batch after the other."""

    def __init__(self, name: str, x: np.ndarray[Any, Any]) -> None:
        self._batches = iter([{name: x[start : start + BATCH]} for start in range(0, len(x), BATCH)])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next feeds, or None at the end."""
        return next(self._batches, None)


def main() -> None:
    """Quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fp32")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("int8")
    parser.add_argument("method", choices=["MinMax", "Percentile", "Entropy", "Distribution"])
    parser.add_argument("--unsigned", action="store_true")
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--ranges", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    name = ort.InferenceSession(args.fp32, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    with np.load(args.calibration) as held:
        reader = Reader(name, held["x"])
    if args.ranges:
        calibrator = create_calibrator(
            args.fp32, None, args.int8, CalibrationMethod[args.method], extra_options={"symmetric": True}
        )
        calibrator.collect_data(reader)
        calibrator.compute_data()
        return
    # TensorRT takes neither an int32 bias nor a zero point
    extra: dict[str, Any] = {}
    if not args.unsigned:
        extra |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    if args.lean:
        extra["OpTypesToExcludeOutputQuantization"] = LEAN
    quantize_static(
        args.fp32,
        args.int8,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=LEAN if args.lean else None,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8 if args.unsigned else QuantType.QInt8,
        calibrate_method=CalibrationMethod[args.method],
        extra_options=extra,
    )


if __name__ == "__main__":
    main()
