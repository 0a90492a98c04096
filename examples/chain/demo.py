"""From training to an engine that a device runs: train, shrink to budgets, prove, publish, update. `make chain-demo`.

All parts are real: the trainer, engines measured on this machine, Debian's docker-registry, and the update agent. Each
step says what must come out, and the demo fails where something else does.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.cpu import host_machine

HERE = Path(os.path.relpath(Path(__file__).parent))
EXAMPLES = Path(os.path.relpath(Path(__file__).parents[1]))
sys.path.insert(0, str(EXAMPLES))

from parts import Device, fail, registry, run, say  # noqa: E402

OUT = Path("build/chain-demo")
MODEL = f"{HERE / 'model.py'}:build"
DATA = ("--data", OUT / "train.npz", "--val", OUT / "validation.npz", "--augment", "shift:2,rotate:10")
WEIGHTS, SIZES = OUT / "residual.safetensors", OUT / "shrunk"
NAME, VERSION = "digits", "1.0.0"
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
ALLOWED_DROP = 1.0
"""Points of top-1 on the validation images that shrinking may lose."""
TIE = 1e-3
"""Points that are no difference: they come of sums in float32."""
LUCK = 2.0
"""Points that top-1 on 400 other images may lie below: three standard deviations where 98 % are right."""


def shrink(*budgets: str, code: int = 0, interrupt_at: str = "") -> str:
    """Shrink the trained network in the demo's folder, or go on there."""
    how = ("--epochs", "3", "--shares", "0.4,0.6", "--precisions", "fp32,int8", "--target", "llvm", "--device", "host")
    most = ("--max-accuracy-drop", f"{ALLOWED_DROP:g}")
    command = ("cnncc", "shrink", MODEL, "--weights", WEIGHTS, *DATA, *how, *most, *budgets, "-o", SIZES)
    return run(*command, code=code, interrupt_at=interrupt_at)


def sizes() -> list[dict[str, Any]]:
    """Return what is measured so far: the whole network in fp32 first."""
    points: list[dict[str, Any]] = json.loads((SIZES / "shrink.json").read_text("utf-8"))["points"]
    return points


def chosen(said: str) -> dict[str, Any]:
    """Return the size whose bundle `cnncc shrink` names in its last line."""
    named = said.splitlines()[-1].partition("  ")[0]
    found = [point for point in sizes() if str(SIZES / point["bundle"]) == named]
    if len(found) != 1:
        fail(f"{named} is no size that was measured")
    return found[0]


def lost(point: dict[str, Any]) -> float:
    """Return the points of top-1 on the validation images that a size loses of the whole network's."""
    return 100 * float(sizes()[0]["metric"] - point["metric"])


def milliseconds(point: dict[str, Any]) -> float:
    """Return what a run takes."""
    return 1e3 * float(point["seconds"])


def train() -> None:
    """Write the data, and train a network that is roomier than it need be."""
    say("scikit-learn's digits in three parts: to learn from, to choose by, and held out, by which nothing is chosen")
    run("python", HERE / "data.py", "--out", OUT)
    say("Train a residual network with more channels than digits need")
    run("cnncc", "train", MODEL, *DATA, "--epochs", "6", "-o", WEIGHTS)


def make_small() -> Path:
    """Shrink the network, with an interruption; return the bundle that is taken."""
    say("Shrink it: less and less of it, taught by the whole, as fp32 and int8 engines. Ctrl-C in the middle")
    shrink(code=INTERRUPTED, interrupt_at="40% gone, fp32")
    before = sizes()

    say("The same command goes on: what was made is not made again; the fastest within the budget is named")
    found = chosen(shrink())
    made = sizes()
    if before[-1]["share"] != 0.4 or made[: len(before)] != before:
        fail("what was measured before the interruption should be kept, and not be measured again")
    if [(each["share"], each["precision"]) for each in made] != [
        (share, precision) for share in (0, 0.4, 0.6) for precision in ("fp32", "int8")
    ]:
        fail("three sizes were asked for, each in fp32 and int8")
    whole, rivals = made[0], [each for each in made if lost(each) < ALLOWED_DROP - TIE]
    if lost(found) > ALLOWED_DROP + TIE or any(each["ratio"][0] < found["ratio"][0] for each in rivals):
        fail(f"the fastest that loses no more than {ALLOWED_DROP:g} points should be named")
    if not found["share"] or found["ratio"][2] >= 1 or found["size"] >= whole["size"]:
        fail("what is named should have lost channels, and be faster and smaller for that")

    half = f"{whole['seconds'] * 1e3 / 2:.3f}ms"
    say("Another budget, half the time of the whole: nothing is made anew, and the most accurate within is named")
    other = chosen(shrink("--latency", half))
    if sizes() != made:
        fail("a budget is no reason to measure again")
    rivals = [each for each in rivals if milliseconds(each) <= float(half.removesuffix("ms"))]
    if milliseconds(other) > float(half.removesuffix("ms")) or any(lost(each) < lost(other) - TIE for each in rivals):
        fail(f"the most accurate that takes no more than {half} should be named")
    return SIZES / found["bundle"]


def prove(bundle: Path) -> None:
    """Prove and measure the engine that was chosen, once more and by itself."""
    say("The proof again, on the held-out images; and beside what one would take instead")
    run("cnncc", "verify", bundle, "--data", OUT / "heldout.npz", says="parity passed")
    run("cnncc", "bench", bundle, "--against", "ort,torch", "--rounds", "4", "--min-time", "0.5")


def publish(bundle: Path, device: Device) -> None:
    """Publish the engine, and have the device take it."""
    with registry(OUT / "registry") as url:
        say("A registry, the keys of a fleet, and a device that believes them")
        run("cnncc", "fleet", "trust", "init", "--registry", url, "--name", NAME)
        root = ("--root", OUT / "publisher" / NAME / "root.json")
        device.agent(
            *("enroll", *root, "--registry", url, "--name", NAME),
            *("--channel", device.channel, "--device", device.name),
        )
        say("Publish it; the device tries it, and takes it")
        run("cnncc", "publish", bundle, "--name", NAME, "--version", VERSION, "--channel", device.channel)
        device.agent("once", says=f"✓ runs release {VERSION}")
    made, runs = read_bundle(bundle).manifest.files, read_bundle(device.current).manifest.files
    if not device.status()["whole"] or any(record.sha256 != made[name].sha256 for name, record in runs.items()):
        fail(f"{device.name} should run {bundle}, whole")


def classify(bundle: Path, device: Device) -> None:
    """Hold what the device's application gets right of the held-out images against what was promised."""
    say("The held-out images, by the whole network's engine and by the device's")
    print(f"{'engine':14}  {'validation':>10}  {'held out':>8}  {'latency':>8}")
    [small] = (each for each in sizes() if each["bundle"] == bundle.name)
    for point, path in ((sizes()[0], SIZES / sizes()[0]["bundle"]), (small, device.current)):
        told = device.ask(EXAMPLES / "classify.py", path, OUT / "heldout.npz")
        right = told["right"] / told["of"]
        name = f"{point['share']:.0%} gone" if point["share"] else "whole"
        figures = f"{point['metric']:10.2%}  {right:8.2%}  {milliseconds(point):.3f} ms"
        print(f"{name + ', ' + point['precision']:14}  {figures}", flush=True)
        if right < point["metric"] - LUCK / 100:
            fail(f"that engine gets fewer right than the validation images promised, by more than {LUCK:g} points")


def main() -> None:
    """Run every act; whatever ends it, nothing stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # a script's background job would ignore Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    os.environ["CNNCC_FLEET_HOME"] = str(OUT / "publisher")
    os.environ["CNNCC_FLEET_PASSPHRASE"] = secrets.token_urlsafe()
    # batches are too small for more threads, which would only wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
    print("$ export OMP_NUM_THREADS=1")
    train()
    bundle = make_small()
    prove(bundle)
    device = Device("lab", host_machine(), "stable", OUT / "device")
    publish(bundle, device)
    classify(bundle, device)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Everything is in {OUT}.")


if __name__ == "__main__":
    main()
