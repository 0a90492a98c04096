"""Compiles architectures as a user would and prints a table: parity, compile time, peak memory, size.

    python benchmarks/architectures.py                       # all that cnncc promises, and onnx's light models
    python benchmarks/architectures.py resnet18 unet         # some

Memory is the sum over the command's processes (proportional set size), sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo.factories import TORCHVISION, reference  # noqa: E402  # the tests own the list of architectures
from tests.zoo.test_zoo import SHAPES  # noqa: E402

LIGHT = {path.stem: path for path in (Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")}
SAMPLE_S = 0.02


@dataclass(frozen=True)
class Row:
    """One compile.

    Attributes:
        seconds: Of the whole command, with an empty cache.
        peak: Bytes, all processes together.
        document: What ``cnncc compile --json`` printed.
        bundle: What it made.
    """

    seconds: float
    peak: int
    document: dict[str, object]
    bundle: Path


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures or light models; all of them by default")
    names = parser.parse_args().names or [*TORCHVISION, "unet", *sorted(LIGHT)]
    print(
        f"{'model':28} {'parity':8} {'rel. error':>10} {'allowed':>8} {'top-1':>7} {'seconds':>8} "
        f"{'peak MB':>8} {'engine MB':>9}"
    )
    failed = False
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            failed |= not show(name, compile_one(name, Path(folder)))
    sys.exit(failed)


def compile_one(name: str, folder: Path) -> Row:
    """Compile one model with an empty cache."""
    model = [str(LIGHT[name])] if name in LIGHT else [reference(name), "--input-shape", SHAPES.get(name, "1,3,224,224")]
    bundle = folder / "model.cnncc"
    command = [
        sys.executable,
        "-m",
        "cnncc.cli",
        "compile",
        *model,
        "-o",
        str(bundle),
        "--cache-dir",
        str(folder / "cache"),
    ]
    start, peak = time.monotonic(), 0
    with subprocess.Popen([*command, "--json", "--quiet"], stdout=subprocess.PIPE, cwd=folder) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(SAMPLE_S)
        assert process.stdout is not None
        return Row(time.monotonic() - start, peak, json.load(process.stdout), bundle)


def memory_of(root: int) -> int:
    """Return the proportional set size of a process and its descendants, bytes."""
    total = 0
    for pid in (root, *descendants(root)):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
        except (OSError, IndexError, ValueError):  # it ended meanwhile
            continue
    return total


def descendants(pid: int) -> list[int]:
    """Return the process ids below one."""
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(deeper for child in children for deeper in descendants(child))]


def show(name: str, row: Row) -> bool:
    """Print a line; return whether parity passed."""
    if "error" in row.document:
        print(f"{name:28} {row.document['error']}: {row.document['message']}", flush=True)
        return False
    report = json.loads((row.bundle / "parity.json").read_bytes())
    engine = next(s for s in report["subjects"] if (s["subject"], s["against"]) == ("engine", "truth"))
    worst = max(engine["outputs"], key=lambda output: output["rel_l2"] or 0.0)
    agreed = [o["top1_agreement"] for o in engine["outputs"] if o["top1_agreement"] is not None]
    size = (row.bundle / "engine.so").stat().st_size
    print(
        f"{name:28} {'passed' if report['passed'] else 'failed':8} {worst['rel_l2'] or 0:10.1e} "
        f"{(worst['tolerance'] or {}).get('rel_l2') or 0:8.1e} {min(agreed, default=1):7.1%} "
        f"{row.seconds:8.1f} {row.peak / 1e6:8.0f} {size / 1e6:9.1f}",
        flush=True,
    )
    return bool(report["passed"])


if __name__ == "__main__":
    main()
