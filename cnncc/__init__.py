"""cnncc: compiles trained CNNs into verified, benchmarked engines for edge and accelerator hardware."""

import os

# ONNX Runtime (1.29 and newer) reports on models to its maker unless this is set before it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
