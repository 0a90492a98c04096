"""The whole path in one go: train, compile, verify, benchmark, classify. `make demo` runs this."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from model import build
from safetensors.torch import load_file

import cnncc_runtime

HERE = Path(os.path.relpath(Path(__file__).parent))
OUT = Path("build/demo")
REQUIRED_ACCURACY = 0.97


def step(title: str, *command: str) -> None:
    """Show a command and run it; a failure ends the demo."""
    print(f"\n── {title}\n$ {shlex.join(command)}", flush=True)
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run([program, *command[1:]], check=False)
    if result.returncode:
        sys.exit(f"the demo stopped: exit code {result.returncode}")


def compare() -> None:
    """Classify the held-out images in PyTorch and in the engine; they must agree, and be right often enough."""
    print("\n── The held-out images, in PyTorch and in the engine", flush=True)
    with np.load(OUT / "heldout.npz") as held:
        x, y = held["x"], held["y"]
    network = build()
    network.load_state_dict(load_file(OUT / "digits.safetensors"))
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x)).numpy().argmax(1)
    engine = cnncc_runtime.load(OUT / "digits.cnncc")
    found = np.array([np.asarray(engine(image[None])).argmax() for image in x])
    accuracy = float((found == y).mean())
    print(f"PyTorch {float((expected == y).mean()):.2%}, engine {accuracy:.2%} of {len(y)} images")
    print(f"same prediction on {int((found == expected).sum())} of {len(y)}")
    if accuracy < REQUIRED_ACCURACY or not np.array_equal(found, expected):
        sys.exit(f"the demo failed: the engine must agree everywhere and reach {REQUIRED_ACCURACY:.0%}")


def main() -> None:
    """Run every step."""
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    weights, bundle = str(OUT / "digits.safetensors"), str(OUT / "digits.cnncc")
    model = (
        str(HERE.relative_to(Path.cwd()) / "model.py") if HERE.is_relative_to(Path.cwd()) else str(HERE / "model.py")
    )
    step("Train", "python", str(HERE / "train.py"), "--out", str(OUT))
    step(
        "Compile",
        *("cnncc", "compile", f"{model}:build", "--weights", weights, "--input-shape", "1,3,28,28"),
        *("--target", "llvm", "--data", str(OUT / "heldout.npz"), "-o", bundle),
    )
    step("Verify", "cnncc", "verify", bundle)
    step("Benchmark", "cnncc", "bench", bundle, "--against", "ort,torch")
    compare()
    step("Classify a picture", "cnncc", "run", bundle, "--input", str(OUT / "seven.png"))
    print(f"\nDone in {time.monotonic() - start:.0f} s. The bundle is {bundle}.")


if __name__ == "__main__":
    main()
