"""A trtexec without a GPU: builds by copying the model, says how long it took, and writes down how it was called."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import onnxruntime

here = pathlib.Path(__file__).parent
flags = dict(argument.lstrip("-").partition("=")[::2] for argument in sys.argv[1:])
with (here / "calls").open("a") as file:
    file.write(json.dumps(flags) + "\n")
sys.stdout.write("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] # trtexec\n")
if "help" in flags:
    sys.stdout.write(
        "  --stronglyTyped  Create a strongly typed network.\n  --noTF32\n  --noCudaGraph  Disable CUDA graphs.\n"
    )
elif "onnx" in flags:
    if (here / "broken").exists():
        sys.stdout.write("[11/28/2026-03:00:00] [E] Error[4]: the network is not strong enough\n")
        sys.exit(1)
    pathlib.Path(flags["saveEngine"]).write_bytes(pathlib.Path(flags["onnx"]).read_bytes())
elif "exportTimes" in flags:
    row = {"h2dMs": 0.25, "computeMs": 1.5, "d2hMs": 0.25, "latencyMs": 2.0}
    pathlib.Path(flags["exportTimes"]).write_text(json.dumps([row] * int(flags["iterations"])))
else:
    session = onnxruntime.InferenceSession(flags["loadEngine"], providers=["CPUExecutionProvider"])
    name, _, file = flags["loadInputs"].partition(":")
    shape = flags["shapes"].partition(":")[2].split("x") if "shapes" in flags else session.get_inputs()[0].shape
    x = np.fromfile(file, np.float32).reshape([int(size) for size in shape])
    rows = [
        {"name": output.name, "dimensions": "x".join(map(str, value.shape)), "values": value.ravel().tolist()}
        for output, value in zip(session.get_outputs(), session.run(None, {name: x}), strict=True)
    ]
    pathlib.Path(flags["exportOutput"]).write_text(json.dumps(rows))
