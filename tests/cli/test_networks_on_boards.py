"""Real networks for ARM boards, compiled and proven at a desk: every engine passes parity under QEMU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnncc_runtime.bundle import read_bundle
from tests.cli.harness import DIGITS, apart
from tests.qemu import board
from tests.runtime.c_runner import RUNTIMES
from tests.zoo.factories import reference

BOARDS = {
    "cortex-a72": ("--device", "raspberry-pi-4"),
    "cortex-a76": ("--device", "raspberry-pi-5"),
    "cortex-a7": ("--device", "cortex-a7"),
}
"""CPU → what names it."""

NETWORKS = {
    "digits": (f"{DIGITS}:build", "1,3,28,28"),
    "mobilenet_v2": (reference("mobilenet_v2"), "1,3,64,64"),
    "residual": (reference("residual"), "1,3,32,32"),
    "resnet18": (reference("resnet18"), "1,3,224,224"),
}
"""Name → MODEL and its input's shape, small where emulation would take minutes."""

INT8 = ("--precision", "int8", "--data", "random", "--allow-slow")

MARKS = {"resnet18": pytest.mark.zoo}


def cases() -> list[object]:
    """Return every network on every board; ResNet-18 on the newest alone."""
    return [
        pytest.param(name, cpu, precision, id=f"{name}-{cpu}-{precision}", marks=MARKS.get(name, pytest.mark.slow))
        for name in NETWORKS
        for cpu in BOARDS
        for precision in ("fp32", "int8")
        if name != "resnet18" or cpu == "cortex-a76"
    ]


@pytest.mark.parametrize(("name", "cpu", "precision"), cases())
def test_a_network_passes_parity_under_emulation(name: str, cpu: str, precision: str, tmp_path: Path) -> None:
    board.require()
    board.require("arm")
    model, shape = NETWORKS[name]
    bundle = tmp_path / "network.cnncc"
    flags = INT8 if precision == "int8" else ()
    apart("compile", model, "--input-shape", shape, *BOARDS[cpu], *flags, "-o", bundle)
    assert read_bundle(bundle).manifest.parity == "pending"
    apart("verify", bundle, "--emulate", "--cache-dir", RUNTIMES)
    made = read_bundle(bundle)
    assert made.manifest.parity == "passed"
    report = json.loads((bundle / "parity.json").read_text())
    assert any(f"-cpu {cpu}" in note for note in report["notes"]), report["notes"]
    if precision == "int8" and cpu != "cortex-a7":
        sdots = board.disassembly(made.file(made.manifest.engine.file)).count("\tsdot\t")
        assert (sdots > 40) == (cpu == "cortex-a76"), sdots
