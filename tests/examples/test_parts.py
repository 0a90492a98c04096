"""What demos are made of: a command that does what it should not ends the demo."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cnncc_runtime.cpu import host_machine
from tests.cli.harness import ROOT

COUNTS = "import time\nfor number in range(600): print(number, flush=True); time.sleep(0.1)"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("parts")


def test_a_command_is_interrupted_as_soon_as_it_says_what_it_should(parts: ModuleType) -> None:
    said = parts.run(sys.executable, "-c", COUNTS, code=-2, interrupt_at="2")
    assert said.startswith("0\n1\n2\n")
    assert "KeyboardInterrupt" in said
    assert "\n599\n" not in said


@pytest.mark.parametrize(
    ("program", "expected", "why"),
    [
        ("print(1)", {"interrupt_at": "2"}, "was to be interrupted then: 2"),
        ("print(1)", {"says": "2"}, "should have said: 2"),
        ("print(1)", {"code": 30}, "ended with exit code 30, not with 0"),
        ("raise SystemExit(4)", {}, "ended with exit code 0, not with 4"),
        (COUNTS, {"interrupt_at": "2"}, "ended with exit code 0, not with -2"),
    ],
)
def test_a_command_that_does_something_else_ends_the_demo(
    parts: ModuleType, program: str, expected: dict[str, object], why: str
) -> None:
    with pytest.raises(SystemExit, match=why):
        parts.run(sys.executable, "-c", program, **expected)


def test_a_device_of_this_machines_kind_is_not_emulated(parts: ModuleType, tmp_path: Path) -> None:
    assert not parts.Device("lab", host_machine(), "stable", tmp_path).emulated
    assert parts.Device("hall", "of another kind", "stable", tmp_path).emulated
