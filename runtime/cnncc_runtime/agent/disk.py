"""The few things that activation does to a disk, so that a simulated one can lose power between any two of them.

Paths are relative to the agent's folder. Nothing is durable before it is flushed: a file's bytes by `Disk.flush`, names
in a folder by `Disk.flush_folder` (POSIX; ext4 and others may lose a rename that was not).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from cnncc_runtime.digests import digest_file
from cnncc_runtime.files import storage_errors, sync


class Disk(Protocol):
    """A folder of the agent's own."""

    def exists(self, path: str) -> bool:
        """Tell whether there is a file, a folder or a link, whatever it leads to."""
        ...

    def list(self, path: str) -> list[str]:
        """Return the names in a folder; none where there is no folder."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return a small file's bytes; None where there is none, or a link."""
        ...

    def digest(self, path: str) -> str | None:
        """Return a file's digest; None where there is none, or a link."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, anew."""
        ...

    def flush(self, path: str) -> None:
        """Make a file's bytes durable."""
        ...

    def flush_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file, folder or link another name; a file or link of that name is replaced in the same step."""
        ...

    def folder(self, path: str) -> None:
        """Make a folder, unless it is there."""
        ...

    def hard_link(self, path: str, name: str) -> None:
        """Give a file a second name."""
        ...

    def link(self, target: str, name: str) -> None:
        """Make a symbolic link, which leads to ``target`` from the folder that it is in."""
        ...

    def target(self, name: str) -> str | None:
        """Return where a symbolic link leads; None where there is none."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, a link, or a folder and all in it; nothing where there is nothing."""
        ...


class RealDisk:
    """A folder of this machine.

    Args:
        root: The folder; made where it is not there.

    Every method raises `StorageFailed` where the disk is full, read-only or broken.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _at(self, path: str) -> Iterator[Path]:
        whole = self.root / path
        with storage_errors(whole):
            yield whole

    def exists(self, path: str) -> bool:
        """See `Disk`."""
        return os.path.lexists(self.root / path)

    def list(self, path: str) -> list[str]:
        """See `Disk`."""
        with self._at(path) as folder:
            return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def read(self, path: str) -> bytes | None:
        """See `Disk`."""
        with self._at(path) as file:
            return file.read_bytes() if _is_plain(file) else None

    def digest(self, path: str) -> str | None:
        """See `Disk`."""
        with self._at(path) as file:
            return digest_file(file) if _is_plain(file) else None

    def write(self, path: str, data: bytes) -> None:
        """See `Disk`."""
        with self._at(path) as file:
            file.write_bytes(data)

    def flush(self, path: str) -> None:
        """See `Disk`."""
        with self._at(path) as file:
            sync(file)

    def flush_folder(self, path: str) -> None:
        """See `Disk`."""
        self.flush(path)

    def rename(self, old: str, new: str) -> None:
        """See `Disk`."""
        with self._at(new) as file:
            (self.root / old).replace(file)

    def folder(self, path: str) -> None:
        """See `Disk`."""
        with self._at(path) as folder:
            folder.mkdir(exist_ok=True)

    def hard_link(self, path: str, name: str) -> None:
        """See `Disk`."""
        with self._at(name) as file:
            file.hardlink_to(self.root / path)

    def link(self, target: str, name: str) -> None:
        """See `Disk`."""
        with self._at(name) as file:
            file.symlink_to(target)

    def target(self, name: str) -> str | None:
        """See `Disk`."""
        with self._at(name) as file:
            return str(file.readlink()) if file.is_symlink() else None

    def remove(self, path: str) -> None:
        """See `Disk`."""
        with self._at(path) as file:
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)


def _is_plain(file: Path) -> bool:
    """Tell whether there is a file, by its own name: what a link leads to may be changed by others."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
