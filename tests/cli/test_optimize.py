"""``cnncc compile --optimize measured``: what is measured, where it is kept, and when it is used."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from cnncc_runtime.bundle import read_bundle
from tests.cli.conftest import Digits
from tests.cli.harness import call, finish, leftovers, start
from tests.cli.test_faults import DEFAULT_SIGINT

BUDGET = ("--optimize-budget", "30")


def compile_(digits: Digits, folder: Path, *more: str | Path, code: int = 0) -> str:
    """Compile the digits CNN and return what was said."""
    arguments = ("compile", digits.model, "--weights", digits.weights, "-o", folder / "digits.cnncc")
    return call(*arguments, *more, code=code).stderr


@pytest.fixture(scope="module")
def measured(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measured bundle and its database."""
    folder = tmp_path_factory.mktemp("measured")
    said = compile_(digits, folder, "--optimize", "measured", *BUDGET, "--kernel-database", folder / "db.json")
    assert re.search(r"✓ kernels .* 2 of 2 convolutions measured", said), said
    assert "parity passed" in said
    return folder


def test_a_measured_engine_is_proven_and_leaves_its_database(measured: Path) -> None:
    assert read_bundle(measured / "digits.cnncc").manifest.parity == "passed"
    document = json.loads((measured / "db.json").read_bytes())
    assert document["schema"] == "cnncc.kernel-database/1"
    assert [len(section["convolutions"]) for section in document["sections"]] == [2]
    assert not leftovers(measured)


def test_a_rerun_measures_nothing_and_reuses_every_stage(digits: Digits, measured: Path) -> None:
    before = (measured / "db.json").read_bytes()
    said = compile_(digits, measured, "--optimize", "measured", "--kernel-database", measured / "db.json")
    assert "= kernels" in said
    assert "= build" in said
    assert "✓" not in said
    assert (measured / "db.json").read_bytes() == before


def test_rules_take_what_the_database_has(digits: Digits, measured: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "from the device.json"
    shipped.write_bytes((measured / "db.json").read_bytes())
    said = compile_(digits, tmp_path, "--kernel-database", shipped)
    assert re.search(r"✓ kernels .* 0 of 2 convolutions measured, 2 known", said), said
    assert "= build" in said  # the same measurements make the same engine
    assert shipped.read_bytes() == (measured / "db.json").read_bytes()


def test_a_changed_database_is_looked_at_again(digits: Digits, measured: Path, tmp_path: Path) -> None:
    arguments = ("--kernel-database", tmp_path / "db.json")
    text = (measured / "db.json").read_text()
    (tmp_path / "db.json").write_text(text)
    compile_(digits, tmp_path, *arguments)
    (tmp_path / "db.json").write_text(re.sub(r'"kernels":"sha256:\w+"', '"kernels":"sha256:of old ones"', text))
    said = compile_(digits, tmp_path, *arguments)
    assert "2 convolutions in" in said
    assert "were measured with another TVM or other kernels of cnncc; they are not used" in said
    assert "0 of 2 convolutions measured, 2 by rule alone" in said


@pytest.mark.slow
def test_without_a_file_the_database_lies_in_the_cache_folder(digits: Digits, tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    said = compile_(digits, tmp_path, "--optimize", "measured", "--optimize-budget", "1e-9", *cache)
    assert "the budget of 1e-09 s ended before 2 of 2 convolutions were measured" in said
    assert not (tmp_path / "cache" / "kernels.json").exists()
    said = compile_(digits, tmp_path, "--optimize", "measured", *BUDGET, *cache)
    assert "2 of 2 convolutions measured" in said  # what was left is not taken from the cache
    assert (tmp_path / "cache" / "kernels.json").exists()
    assert not leftovers(tmp_path)
    assert "kernels " not in compile_(digits, tmp_path, *cache)  # rules alone look at no database


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    [
        (("--optimize-budget", "5"), 2, "add --optimize measured"),
        (("--optimize", "measured", "--optimize-budget", "0"), 2, "0"),
        (("--optimize", "measured", "--mcpu", "diamondrapids"), 2, "--kernel-database FILE alone"),
        (("--optimize", "measured", "--mtriple", "aarch64-linux-gnu"), 2, "measure on the device"),
        (("--optimize", "always"), 2, "always"),
        (("--kernel-database", "gone.json"), 4, "there is no kernel database gone.json"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    digits: Digits, tmp_path: Path, arguments: tuple[str, ...], code: int, phrase: str
) -> None:
    said = compile_(digits, tmp_path, *arguments, code=code)
    assert phrase in said
    assert "export" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["rules", "measured"])
@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b'{"schema":"cnncc.kernel-database/1","sec', b"[]"])
def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(
    digits: Digits, tmp_path: Path, level: str, content: bytes
) -> None:
    file = tmp_path / "notes.json"
    file.write_bytes(content)
    said = compile_(digits, tmp_path, "--optimize", level, "--kernel-database", file, code=4)
    assert f"{file} is not a kernel database" in said
    assert "try:" in said
    assert file.read_bytes() == content
    assert not (tmp_path / "digits.cnncc").exists()


@pytest.mark.slow
def test_an_interrupted_measurement_keeps_what_is_finished(digits: Digits, tmp_path: Path) -> None:
    file = tmp_path / "db.json"
    arguments = ("--optimize", "measured", *BUDGET, "--kernel-database", file, "--cache-dir", tmp_path / "cache")
    process = start(
        "compile", digits.model, "--weights", digits.weights, "-o", tmp_path / "d.cnncc", *arguments,
        prefix=DEFAULT_SIGINT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the file system has no event that Python can wait for
    os.killpg(process.pid, signal.SIGINT)
    assert "Traceback" not in finish(process, code=130).stderr
    document = json.loads(file.read_bytes())
    assert [len(section["convolutions"]) for section in document["sections"]] == [1]
    assert not leftovers(tmp_path)
    said = compile_(digits, tmp_path, *arguments)
    assert "1 of 2 convolutions measured, 1 known" in said


def test_a_target_whose_kernels_have_no_knobs_says_so(digits: Digits, tmp_path: Path, wrong_target: str) -> None:
    said = compile_(digits, tmp_path, "--target", wrong_target, "--optimize", "measured", code=2)
    assert f"the kernels of the {wrong_target} target have no knobs to measure" in said
