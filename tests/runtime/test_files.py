"""Files and folders appear whole or not at all, whatever kills the writer."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnncc_runtime import files
from cnncc_runtime.errors import StorageFailed
from cnncc_runtime.files import atomic_file, atomic_folder, scratch_folder, sweep

WRITER = """
import sys
from pathlib import Path
from cnncc_runtime import files
kind, target, exchange = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    def refuse(a, b):
        raise OSError(22, "Invalid argument", str(b))
    files._exchange = refuse
print("ready", flush=True)
for generation in range(10**9):
    content = str(generation) * 20
    if kind == "file":
        with files.atomic_file(target) as partial:
            partial.write_text(content)
    else:
        with files.atomic_folder(target) as partial:
            for name in "abc":
                (partial / name).write_text(content)
"""


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def contents(target: Path) -> set[str]:
    return {(target / name).read_text() for name in "abc"} if target.is_dir() else {target.read_text()}


@pytest.mark.parametrize(("kind", "way"), [("file", "exchange"), ("folder", "exchange"), ("folder", "step aside")])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, kind: str, way: str) -> None:
    chance = random.Random(f"{kind} {way}")
    target = tmp_path / "out"
    for _ in range(25):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(target), way], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        with writer.stdout:
            writer.stdout.readline()
            time.sleep(chance.uniform(0.002, 0.03))
            writer.send_signal(signal.SIGKILL)
        writer.wait()
        sweep(tmp_path)  # what the next writer does; only the fall-back needs it to be readable
        assert leftovers(tmp_path) == []
        if target.exists():
            found = contents(target)
            assert len(found) == 1
            assert found.pop(), "half-written"
    assert target.exists(), "no writer ever finished: the test saw nothing"


def test_a_failing_body_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="mine"), atomic_file(target) as partial:
        partial.write_text("new")
        raise RuntimeError("mine")
    with pytest.raises(RuntimeError, match="mine"), atomic_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("new")
        raise RuntimeError("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert target.read_text() == "old"


def test_an_error_of_the_body_is_not_called_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "the-input-that-is-missing").read_bytes()
    with pytest.raises(ConnectionResetError), atomic_folder(tmp_path / "out"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("way", ["exchange", "step aside"])
def test_an_existing_folder_is_replaced_whole(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "step aside":
        monkeypatch.setattr(files, "_exchange", unsupported)
    target = tmp_path / "out"
    for content in ("old", "new"):
        with atomic_folder(target) as partial:
            (partial / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert leftovers(tmp_path) == []


def unsupported(_a: Path, b: Path) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(b))


def test_stepping_aside_gives_the_old_folder_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(files, "_exchange", unsupported)
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk", str(self))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageFailed, match="broken disk"), atomic_folder(target) as partial:
        (partial / "new").write_text("new")
    assert (target / "old").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("ten years")
    with pytest.raises(StorageFailed, match="folder of other things"), atomic_folder(home, marker="manifest.json"):
        pytest.fail("the body must not run")
    assert (home / "thesis").read_text() == "ten years"
    (home / "manifest.json").write_text("{}")
    with atomic_folder(home, marker="manifest.json"):
        pass
    assert list(home.iterdir()) == []


def test_a_file_in_the_folders_place_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("weights")
    with pytest.raises(StorageFailed, match="file exists"), atomic_folder(tmp_path / "model.onnx"):
        pytest.fail("the body must not run")
    assert (tmp_path / "model.onnx").read_text() == "weights"


def test_sweep_removes_dead_leftovers_and_spares_live_writers(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as live:
        dead = tmp_path / ".out.00000000.partial"
        dead.mkdir()
        (dead / "half").write_text("half")
        Path(f"{dead}.lock").touch()
        assert sweep(tmp_path) == [dead]
        assert live.is_dir()
        assert not dead.exists()
        (live / "whole").write_text("whole")
    assert (tmp_path / "out" / "whole").read_text() == "whole"
    assert leftovers(tmp_path) == []


def test_sweep_puts_back_a_folder_whose_successor_never_came(tmp_path: Path) -> None:
    partial = tmp_path / ".my.model.cnncc.00000000.partial"
    partial.mkdir()
    old = Path(f"{partial}.old")
    old.mkdir()
    (old / "old").write_text("old")
    Path(f"{partial}.lock").touch()
    sweep(tmp_path)
    assert (tmp_path / "my.model.cnncc" / "old").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_pipe_or_link_among_the_locks_does_not_hang_or_mislead_the_sweep(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.00000000.partial.lock")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".b.00000000.partial.lock").symlink_to(tmp_path / "precious")
    sweep(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


def crowd(target: str, number: int) -> None:
    for _ in range(15):
        with atomic_folder(Path(target)) as partial:
            for name in "abc":
                (partial / name).write_text(f"{number}")


def test_many_writers_of_one_folder_all_succeed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=crowd, args=(str(tmp_path / "out"), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(contents(tmp_path / "out")) == 1
    assert leftovers(tmp_path) == []


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Let a write of more than 64 KiB fail for lack of space: a tiny tmpfs, or, without the right to mount, a limit."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=64k") == 0:
        try:
            yield
        finally:
            assert libc.umount(os.fsencode(folder)) == 0
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk):
        (disk / "out").write_text("old")
        with pytest.raises(StorageFailed, match="cannot write") as caught, atomic_file(disk / "out") as partial:
            partial.write_bytes(bytes(1 << 20))
        assert caught.value.hint
        assert caught.value.where == (str(disk / "out"),)
        with pytest.raises(StorageFailed), atomic_folder(disk / "folder") as partial:
            (partial / "big").write_bytes(bytes(1 << 20))
        assert [path.name for path in disk.iterdir()] == ["out"]
        assert (disk / "out").read_text() == "old"


def test_places_that_cannot_be_written_are_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "no" / "out", tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("n" * 250)):
        with pytest.raises(StorageFailed, match="cannot write") as caught, atomic_file(target) as partial:
            partial.touch()
        assert caught.value.hint, target


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    # root may write where the mode forbids it: so a read-only mount for root, the mode for others
    if os.geteuid() == 0:
        assert libc.mount(b"none", os.fsencode(folder), b"tmpfs", 1, b"size=64k") == 0
    else:
        folder.chmod(0o500)
    try:
        with pytest.raises(StorageFailed, match=r"read-only|permission denied") as caught, atomic_file(folder / "out"):
            pytest.fail("the body must not run")
        assert caught.value.hint == "choose a folder that you may write to"
    finally:
        if os.geteuid() == 0:
            libc.umount(os.fsencode(folder))


def test_a_scratch_folder_is_empty_and_goes_away(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "new" / "cache") as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").touch()
    assert list((tmp_path / "new" / "cache").iterdir()) == []
