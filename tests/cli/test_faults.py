"""What a compile leaves behind when it is interrupted, killed, starved of disk, raced, or given a damaged cache."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.digests import digest_file
from tests.cli.conftest import Digits, install_target
from tests.cli.harness import STAGES, Outcome, apart, finish, leftovers, start, tree

pytestmark = pytest.mark.slow

DEFAULT_SIGINT = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
)
"""Starts a command with Ctrl-C on, as a shell's foreground job has it: background jobs inherit it off."""

PATIENCE = 60.0
"""Seconds; longer than any stage here takes on a busy machine."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@dataclass(frozen=True)
class Place:
    """Where a disturbed compile works.

    Attributes:
        root: Holds everything below.
        cache: The cache folder.
        bundle: The output.
        temporary: ``$TMPDIR``.
        mark: In the environment of the command and so of every child it starts.
    """

    root: Path
    cache: Path
    bundle: Path
    temporary: Path
    mark: str

    @property
    def env(self) -> dict[str, str]:
        """The environment of commands that work here."""
        return {"TMPDIR": str(self.temporary), "CNNCC_TEST_MARK": self.mark, "CNNCC_CACHE_DIR": str(self.cache)}

    def arguments(self, digits: Digits) -> tuple[str | Path, ...]:
        """The compile command."""
        return ("compile", digits.model, "--weights", digits.weights, "-o", self.bundle)

    def keep(self, stages: tuple[str, ...]) -> None:
        """Forget the cached results of all other stages."""
        for stage in set(STAGES) - set(stages):
            shutil.rmtree(self.cache / "v1" / "entries" / stage, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that bear the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("CNNCC_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
        return found

    def check_no_process_is_left(self) -> None:
        """Fail when a child outlives its command; the kernel needs a moment to kill it."""
        deadline = time.monotonic() + 10
        while left := self.processes():
            assert time.monotonic() < deadline, [process.cmdline() for process in left]
            psutil.wait_procs(left, timeout=0.2)

    def check_nothing_is_left(self, *, but: str = "") -> None:
        """Fail when a temporary file is left anywhere."""
        assert [path for path in leftovers(self.root) if not (but and path.name.endswith(but))] == []
        # torch makes an empty cache folder of its own where it is imported
        assert [path for path in self.temporary.rglob("*") if not path.name.startswith("torchinductor_")] == []


@pytest.fixture(scope="module")
def warm(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds every stage of the digits CNN."""
    root = tmp_path_factory.mktemp("warm")
    apart("compile", digits.model, "--weights", digits.weights, "-o", root / "digits.cnncc", "--cache-dir", root / "c")
    return root / "c"


@pytest.fixture
def place(tmp_path: Path, warm: Path) -> Place:
    """A place with a warm cache and no bundle."""
    (tmp_path / "tmp").mkdir()
    shutil.copytree(warm, tmp_path / "cache")
    return Place(tmp_path, tmp_path / "cache", tmp_path / "out" / "digits.cnncc", tmp_path / "tmp", tmp_path.name)


def old_bundle(place: Place, digits: Digits) -> dict[str, bytes]:
    """Put an older bundle at the output, one that must be replaced, and return its content."""
    place.bundle.parent.mkdir(exist_ok=True)
    shutil.copytree(digits.bundle, place.bundle)
    (place.bundle / "parity.json").write_text("of the old bundle")
    return tree(place.bundle)


# ---- signals


def wait_for(process: subprocess.Popen[str], event: str) -> tuple[list[str], threading.Thread]:
    """Read stderr until a line matches; a thread reads the rest, so that the command never waits for its reader."""
    assert process.stderr is not None
    lines: list[str] = []
    while True:
        line = process.stderr.readline()
        assert line, f"'{event}' was never said:\n{''.join(lines)}"
        lines.append(line)
        if re.search(event, line):
            break
    stream = process.stderr
    rest = threading.Thread(target=lambda: lines.extend(stream))
    rest.start()
    return lines, rest


def wait_for_work(process: subprocess.Popen[str], cache: Path) -> None:
    """Wait until a stage has opened its scratch folder."""
    deadline = time.monotonic() + PATIENCE
    while not any(path.is_dir() for path in cache.glob(".scratch.*.partial")):
        assert process.poll() is None, "it ended before its first stage"
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the file system has no event that Python can wait for


def disturb(place: Place, digits: Digits, stage: str, number: signal.Signals, delay: float) -> tuple[int, str]:
    """Start a compile, send it a signal in a stage, and return its exit code and what it said."""
    before = STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES
    place.keep(before)
    process = start(*place.arguments(digits), env=place.env, prefix=DEFAULT_SIGINT)
    try:
        if before:
            lines, rest = wait_for(process, rf"^[✓=] {before[-1]} ")
        else:
            wait_for_work(process, place.cache)
            lines, rest = wait_for_nothing(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)  # a moment within the stage; it may have ended by then
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        code = process.wait(PATIENCE)
        rest.join(PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
    return code, "".join(lines)


def wait_for_nothing(process: subprocess.Popen[str]) -> tuple[list[str], threading.Thread]:
    """Read stderr in a thread."""
    lines: list[str] = []
    stream = process.stderr
    assert stream is not None
    rest = threading.Thread(target=lambda: lines.extend(stream))
    rest.start()
    return lines, rest


LENGTHS = {"export": 1.5, "clean": 0.05, "build": 2.0, "verify": 0.8, "publish": 0.02}
"""Seconds that each stage takes here, about: the moment of a signal is drawn from them."""


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("stage", LENGTHS)
def test_a_signal_in_any_stage_leaves_the_old_bundle_or_none(
    place: Place, digits: Digits, stage: str, number: signal.Signals
) -> None:
    moments = random.Random(f"{stage} {number}")
    old = old_bundle(place, digits)
    if has_none := moments.random() < 0.5:
        shutil.rmtree(place.bundle)
    code, said = disturb(place, digits, stage, number, moments.uniform(0, LENGTHS[stage]))
    place.check_no_process_is_left()
    assert "Traceback" not in said, said
    # Python may end by the signal itself after it was handled; a shell sees the same code
    assert code in (0, CODES[number], -number), said
    unwound = "nothing half-written was left behind" in said
    if place.bundle.exists() and tree(place.bundle) != old:
        assert tree(place.bundle) == tree(digits.bundle)
    else:
        assert unwound or number is signal.SIGKILL  # else the signal came after the command's last act
        assert place.bundle.exists() != has_none
    assert code != 0 or not unwound
    if number is not signal.SIGKILL:
        # a signal between the making of a lock and its use leaves an empty file, which the next run sweeps
        place.check_nothing_is_left(but=".partial.lock")
        return
    apart(*place.arguments(digits), env=place.env)  # nobody could clean up: the next run does
    assert tree(place.bundle) == tree(digits.bundle)
    place.check_nothing_is_left()


SWALLOWING_MODEL = """
import os, signal

try:
    os.kill(os.getpid(), signal.{name})
except KeyboardInterrupt:
    raise ImportError("initialization failed") from None
"""
"""What an extension module does whose initialization a signal interrupts: the signal's exception is lost."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_that_comes_out_as_another_error_is_told_as_the_signal(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "model.py").write_text(SWALLOWING_MODEL.format(name=number.name))
    arguments = ("export", f"{tmp_path / 'model.py'}:build", "-o", tmp_path / "model.onnx", "--json")
    outcome = finish(start(*arguments, prefix=DEFAULT_SIGINT), code=CODES[number])
    assert "Traceback" not in outcome.stderr
    assert (outcome.document["error"], outcome.document["exit_code"]) == ("Interrupted", CODES[number])
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_verify_by_layers_cleans_up_when_it_is_interrupted(
    place: Place, digits: Digits, number: signal.Signals
) -> None:
    process = start("verify", digits.bundle, "--layers", "--json", env=place.env, prefix=DEFAULT_SIGINT)
    wait_for_work(process, place.cache)
    os.killpg(process.pid, number)
    outcome = finish(process, code=CODES[number])
    assert "Traceback" not in outcome.stderr
    if number is not signal.SIGKILL:
        assert (outcome.document["error"], outcome.document["exit_code"]) == ("Interrupted", CODES[number])
    place.check_no_process_is_left()
    apart("verify", digits.bundle, "--layers", env=place.env)
    place.check_nothing_is_left()


# ---- a damaged cache


def blobs(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "v1" / "blobs").rglob("*") if path.is_file())


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "v1" / "entries").rglob("*.json"))


def damage(path: Path, how: str) -> None:
    """Damage a file in place, as a failing disk or a careless user does."""
    if how == "gone":
        path.unlink()
        return
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data[:-1] + bytes([data[-1] ^ 1])}[how])


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_every_damaged_blob_is_noticed_and_made_again(place: Place, digits: Digits, how: str) -> None:
    place.bundle.parent.mkdir()
    for blob in blobs(place.cache):
        damage(blob, how)
    outcome = apart(*place.arguments(digits), env=place.env)
    assert ("is gone" if how == "gone" else "is damaged") in outcome.stderr
    assert "made again" in outcome.stderr
    assert tree(place.bundle) == tree(digits.bundle)
    assert all(digest_file(path) == f"sha256:{path.name}" for path in blobs(place.cache))
    again = apart(*place.arguments(digits), env=place.env)
    assert "unchanged" in again.stdout


@pytest.mark.parametrize("name", ["engine.so", "weights.bin", "manifest.json"])
def test_a_single_damaged_blob_costs_only_the_stage_that_made_it(place: Place, digits: Digits, name: str) -> None:
    place.bundle.parent.mkdir()
    damage(place.cache / "v1" / "blobs" / (digest := digest_file(digits.bundle / name)[7:])[:2] / digest, "flipped")
    outcome = apart(*place.arguments(digits), env=place.env)
    assert f"the cached {name} of" in outcome.stderr
    assert "= export" in outcome.stderr
    assert tree(place.bundle) == tree(digits.bundle)


def test_every_damaged_entry_is_noticed_and_made_again(place: Place, digits: Digits) -> None:
    place.bundle.parent.mkdir()
    for entry in entries(place.cache):
        damage(entry, "cut")
    outcome = apart(*place.arguments(digits), env=place.env)
    for stage in STAGES:
        assert f"the cached {stage} entry is damaged" in outcome.stderr
    assert tree(place.bundle) == tree(digits.bundle)


# ---- a full disk


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[str, ...]]:
    """Make a folder a disk of so many bytes; where that is not permitted, yield what starts a command with a limit.

    The limit is on the size of a file: writes fail in the same places, with another error.
    """
    folder.mkdir(parents=True)
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "cnncc-test", str(folder)], capture_output=True, check=False
        ).returncode
    )
    try:
        yield () if mounted else file_limit(size // 4)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def file_limit(size: int) -> tuple[str, ...]:
    """Return what starts a command whose files may not grow beyond a size."""
    script = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return (sys.executable, "-c", script)


FULL = ("no space left on device", "file too large")


def check_refused_for_space(outcome: Outcome) -> None:
    assert outcome.code == 3, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert any(phrase in outcome.stderr for phrase in FULL), outcome.stderr
    assert "write to another disk" in outcome.stderr


def test_an_output_on_a_full_disk_is_refused_and_leaves_nothing(place: Place, digits: Digits) -> None:
    disk = place.bundle.parent
    with small_disk(disk, 2 << 20) as prefix:
        process = start(*place.arguments(digits), env=place.env, prefix=prefix)
        check_refused_for_space(finish(process, code=None))
        assert list(disk.iterdir()) == []
    elsewhere = place.root / "elsewhere" / place.bundle.name
    elsewhere.parent.mkdir()
    apart(*place.arguments(digits)[:-1], elsewhere, env=place.env)
    assert tree(elsewhere) == tree(digits.bundle)
    place.check_nothing_is_left()


def test_an_old_bundle_on_a_full_disk_stays(place: Place, digits: Digits) -> None:
    size = sum(path.stat().st_size for path in digits.bundle.iterdir())
    with small_disk(place.bundle.parent, size + (1 << 20)) as prefix:
        old = old_bundle(place, digits)
        process = start(*place.arguments(digits), env=place.env, prefix=prefix)
        check_refused_for_space(finish(process, code=None))
        assert tree(place.bundle) == old
        assert leftovers(place.bundle.parent) == []


@pytest.mark.parametrize("kib", [64, 2048, 4096, 9216])
def test_a_cache_on_a_full_disk_is_refused_in_whatever_stage_it_fills(place: Place, digits: Digits, kib: int) -> None:
    place.bundle.parent.mkdir()
    disk = place.root / "disk"
    with small_disk(disk, kib << 10) as prefix:
        arguments = (*place.arguments(digits), "--cache-dir", disk / "cache")
        check_refused_for_space(finish(start(*arguments, env=place.env, prefix=prefix), code=None))
        assert not place.bundle.exists()
        place.check_nothing_is_left()


def test_a_limit_on_file_sizes_is_told_as_what_it_is(place: Place, digits: Digits) -> None:
    place.bundle.parent.mkdir()
    process = start(*place.arguments(digits), env=place.env, prefix=file_limit(64 << 10))
    outcome = finish(process, code=3)
    assert "file too large" in outcome.stderr
    assert "ulimit -f" in outcome.stderr
    assert not place.bundle.exists()
    place.check_nothing_is_left()


# ---- neighbours


def test_two_compiles_of_one_model_into_one_cache_and_one_output_both_succeed(place: Place, digits: Digits) -> None:
    place.bundle.parent.mkdir()
    shutil.rmtree(place.cache)
    pair = [start(*place.arguments(digits), env=place.env) for _ in range(2)]
    for process in pair:
        finish(process)
    assert tree(place.bundle) == tree(digits.bundle)
    place.check_nothing_is_left()
    place.check_no_process_is_left()


def test_two_compiles_of_one_model_to_two_outputs_share_a_cache(place: Place, digits: Digits) -> None:
    place.bundle.parent.mkdir()
    other = place.root / "other.cnncc"
    place.keep(("export", "clean"))
    pair = [
        start(*place.arguments(digits), env=place.env),
        start(*place.arguments(digits)[:-1], other, env=place.env),
    ]
    for process in pair:
        finish(process)
    assert tree(place.bundle) == tree(digits.bundle)
    assert read_bundle(other).manifest.files == read_bundle(place.bundle).manifest.files
    place.check_nothing_is_left()


# ---- a compiler or an engine that dies


DYING_TARGET = """
import os, signal
from cnncc.targets.llvm.target import LlvmTarget


class Dying:
    name = "dying"

    def __init__(self, profile):
        self.profile = profile

    def toolchain(self):
        return LlvmTarget(self.profile).toolchain()

    def build(self, graph, options, workdir):
        print("last words of the compiler", flush=True)
        os.kill(os.getpid(), signal.SIGNAL)
"""


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL"])
def test_a_compiler_that_dies_is_a_typed_error(
    place: Place, digits: Digits, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    install_target(place.root / "site", "dying", DYING_TARGET.replace("SIGNAL", how), "Dying")
    monkeypatch.setenv("PYTHONPATH", str(place.root / "site"), prepend=os.pathsep)
    place.bundle.parent.mkdir()
    outcome = apart(*place.arguments(digits), "--target", "dying", env=place.env, code=5)
    assert f"was killed by {how}" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "last words of the compiler" in outcome.stderr
    assert ("out of memory" in outcome.stderr) == (how == "SIGKILL")
    assert not place.bundle.exists()
    place.check_nothing_is_left()
    place.check_no_process_is_left()
