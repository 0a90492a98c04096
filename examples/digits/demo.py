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
BUNDLES = {"fp32": "digits.cnncc", "auto": "digits-auto.cnncc"}
REQUIRED_ACCURACY = 0.97
ALLOWED_DROP = 0.5  # points


def step(title: str, *command: str) -> None:
    """Show a command and run it; a failure ends the demo."""
    print(f"\n── {title}\n$ {shlex.join(command)}", flush=True)
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run([program, *command[1:]], check=False)
    if result.returncode:
        sys.exit(f"the demo stopped: exit code {result.returncode}")


def compare() -> None:
    """Classify the held-out images in PyTorch and in both engines.

    The float engine must agree with PyTorch everywhere, the other one must lose no more than it was allowed, and both
    must be right often enough.
    """
    print("\n── The held-out images, in PyTorch and in the engines", flush=True)
    with np.load(OUT / "heldout.npz") as held:
        x, y = held["x"], held["y"]
    network = build()
    network.load_state_dict(load_file(OUT / "digits.safetensors"))
    with torch.no_grad():
        scores = network.eval()(torch.from_numpy(x)).numpy()
    print(f"{'':10}  {'accuracy':>8}  {'as PyTorch':>10}  {'SQNR':>8}")
    reached = {"PyTorch": row("PyTorch", scores, scores, y)}
    for name, bundle in BUNDLES.items():
        engine = cnncc_runtime.load(OUT / bundle)
        found = np.concatenate([np.asarray(engine(image[None])) for image in x])
        precision = cnncc_runtime.read_bundle(OUT / bundle).manifest.precision
        reached[name] = row(name if name == precision else f"{name}: {precision}", found, scores, y)
        if name == "fp32" and not np.array_equal(found.argmax(1), scores.argmax(1)):
            sys.exit("the demo failed: the float engine must agree with PyTorch everywhere")
    if min(reached.values()) < REQUIRED_ACCURACY:
        sys.exit(f"the demo failed: both engines must reach {REQUIRED_ACCURACY:.0%}")
    if 100 * (reached["PyTorch"] - reached["auto"]) > ALLOWED_DROP:
        sys.exit(f"the demo failed: int8 may lose {ALLOWED_DROP} points")


def row(name: str, found: np.ndarray, scores: np.ndarray, y: np.ndarray) -> float:
    """Print a line of the comparison and return the accuracy."""
    accuracy = float((found.argmax(1) == y).mean())
    same = int((found.argmax(1) == scores.argmax(1)).sum())
    noise = float(((found - scores) ** 2).sum())
    sqnr = f"{10 * np.log10(float((scores**2).sum()) / noise):.1f} dB" if noise else "–"
    print(f"{name:10}  {accuracy:8.2%}  {same:>4} / {len(y)}  {sqnr:>8}")
    return accuracy


def main() -> None:
    """Run every step."""
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    weights, bundle = str(OUT / "digits.safetensors"), str(OUT / BUNDLES["fp32"])
    model = (
        str(HERE.relative_to(Path.cwd()) / "model.py") if HERE.is_relative_to(Path.cwd()) else str(HERE / "model.py")
    )
    step("Train", "python", str(HERE / "train.py"), "--out", str(OUT))
    step(
        "Compile",
        *("cnncc", "compile", f"{model}:build", "--weights", weights, "--input-shape", "1,3,28,28"),
        *("--target", "llvm", "--data", str(OUT / "heldout.npz"), "-o", bundle),
    )
    step(
        "Compile to int8, where it is faster than fp32, calibrated on training images",
        *("cnncc", "compile", f"{model}:build", "--weights", weights, "--input-shape", "1,3,28,28"),
        *("--target", "llvm", "--precision", "auto", "--data", str(OUT / "calibration.npz")),
        *(
            "--val",
            str(OUT / "heldout.npz"),
            "--max-accuracy-drop",
            str(ALLOWED_DROP),
            "-o",
            str(OUT / BUNDLES["auto"]),
        ),
    )
    step("Verify", "cnncc", "verify", bundle)
    step("Benchmark", "cnncc", "bench", bundle, "--against", "ort,torch")
    compare()
    step("Classify a picture", "cnncc", "run", bundle, "--input", str(OUT / "seven.png"))
    print(f"\nDone in {time.monotonic() - start:.0f} s. The bundle is {bundle}.")


if __name__ == "__main__":
    main()
