"""The house: what lies where, and what the wheels hold."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["compiler", "targets", "calibration"])
def test_the_top_level_links_lead_into_the_package(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == ROOT / "cnncc" / name


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "package"), [(ROOT, "cnncc"), (ROOT / "runtime", "cnncc_runtime")])
def test_a_wheel_holds_its_package_and_nothing_else(folder: Path, package: str, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(folder)],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {package}
    assert f"{package}/py.typed" in names
    if package == "cnncc":
        assert "cnncc/targets/llvm/target.py" in names
        sources = {"threads/pool.c", "threads/pool.ll", "wide/wide.ll", "aot/main.c"}
        assert {f"cnncc/targets/llvm/{source}" for source in sources} <= set(names)
        assert "cnncc/targets/devices/profiles/raspberry-pi-4.toml" in names
    else:
        assert {"cnncc_runtime/c/main.c", "cnncc_runtime/c/Makefile"} <= set(names)
        assert {f"cnncc_runtime/agent/systemd/cnncc-agent{kind}.service" for kind in ("", ".user")} <= set(names)


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_module_that_the_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    assert rows
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        for name in (first, *(f"{Path(first).parent}/{other}" for other in others)):
            assert (ROOT / ("runtime" if name.startswith("cnncc_runtime") else "") / name).exists(), name


def test_the_linter_reads_every_file() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    ruff = [sys.executable, "-m", "ruff", "check", "--show-files"]
    read = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {str(ROOT / name) for name in tracked.stdout.split()} <= set(read)
