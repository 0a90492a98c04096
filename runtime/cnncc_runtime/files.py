"""Files and folders that appear whole or not at all.

Work goes to a sibling ``.NAME.XXXXXXXX.partial``, is flushed to disk, then renamed. The writer holds a lock
(``flock``) on ``.NAME.XXXXXXXX.partial.lock`` meanwhile; the kernel drops it when the writer dies, so the next
writer can tell a dead run's leftovers from a live neighbour's, and sweeps only the dead.

A folder that exists is exchanged with its successor in one step where the file system can (``renameat2`` with
``RENAME_EXCHANGE``: ext4, XFS, btrfs, tmpfs, overlayfs). Elsewhere (some network and FUSE file systems, macOS) the
old one steps aside as ``.NAME.XXXXXXXX.partial.old``, the new one takes its name, the old one is removed: a reader
may find nothing for an instant, and a writer that dies in that instant leaves the old folder to the next `sweep`,
which puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from cnncc_runtime.errors import StorageFailed

_SUFFIX = ".partial"
_LOCK = ".lock"
_OLD = ".old"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

_HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write to another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "create the parent folder first",
    errno.ENOTDIR: "one of the path's parents is a file: choose another path",
    errno.EISDIR: "there is a folder of that name: choose another path",
    errno.EEXIST: "there is a file of that name: choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's storage errors into `StorageFailed`.

    Raises:
        StorageFailed: Disk full, quota, permission, a missing parent, a read-only file system, an I/O error.
    """
    try:
        yield
    except OSError as exc:
        raise _failure(path, exc) from exc


@contextlib.contextmanager
def _own_storage_errors(target: Path) -> Iterator[None]:
    """As `storage_errors`, for errors of the output only: the body may also read files and call other tools."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _DISK and not _is_ours(exc.filename, target):
            raise
        raise _failure(target, exc) from exc


def _is_ours(filename: object, target: Path) -> bool:
    return _is_hidden(filename, target) or filename in (str(target), str(target.parent))


def _is_hidden(filename: object, target: Path) -> bool:
    return isinstance(filename, str) and filename.startswith(str(target.parent / f".{target.name}."))


def _failure(path: Path, exc: OSError) -> StorageFailed:
    reason = (exc.strerror or str(exc)).lower()
    place = path if exc.filename is None or _is_hidden(exc.filename, path) else exc.filename
    return StorageFailed(f"cannot write {path}: {reason}", where=[str(place)], hint=_HINTS.get(exc.errno or 0, ""))


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush folders
            raise
    finally:
        os.close(handle)


def sweep(parent: Path) -> list[Path]:
    """Remove what dead writers left in a folder; live writers' work stays, and a replaced folder is put back.

    Returns:
        The paths removed.
    """
    removed = []
    for lock in sorted(parent.glob(f".*{_SUFFIX}{_LOCK}")):
        with contextlib.suppress(OSError), _held(lock):
            partial = lock.with_name(lock.name.removesuffix(_LOCK))
            _settle(partial)
            lock.unlink(missing_ok=True)
            removed.append(partial)
    return removed


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold a dead writer's lock.

    Raises:
        OSError: Its writer lives, or it is no plain file.
    """
    handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _settle(partial: Path) -> None:
    """Finish what a writer left: put a replaced folder back if nothing took its place, remove the rest."""
    old = partial.with_name(partial.name + _OLD)
    if os.path.lexists(old):
        target = partial.with_name(partial.name[1:].removesuffix(_SUFFIX).rpartition(".")[0])
        if os.path.lexists(target):
            _remove(old)
        else:
            old.rename(target)
    _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    sweep(target.parent)
    partial, lock, handle = _begin(target)
    try:
        yield partial
    finally:
        # what cannot be removed keeps its lock file, for the next sweep; it must not hide the body's own error
        with contextlib.suppress(OSError):
            _settle(partial)
            lock.unlink(missing_ok=True)
        os.close(handle)


def _begin(target: Path) -> tuple[Path, Path, int]:
    """Choose a partial name and lock it; return both names and the lock's handle."""
    while True:
        partial = target.parent / f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}"
        lock = partial.with_name(partial.name + _LOCK)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == lock.stat().st_ino:
                return partial, lock, handle
        os.close(handle)  # a sweep came between creating the file and locking it, and took it for a dead writer's


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it becomes ``target``, on any failure it is gone.

    Raises:
        StorageFailed: The file cannot be written. Other errors of the body pass through.
    """
    with _own_storage_errors(target), _partial(target) as partial:
        yield partial
        sync(partial)
        partial.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``target`` (replacing it), on failure it is gone.

    An existing ``target`` is exchanged in one step, so a reader sees the old or the new folder; see the module's
    docstring for file systems that cannot.

    Args:
        target: The folder to be.
        marker: A file that an existing, non-empty ``target`` must hold to be replaced: whoever gives his home folder
            as the output loses nothing.

    Raises:
        StorageFailed: The folder cannot be written, or ``target`` is something else than such a folder. Other
            errors of the body pass through.
    """
    _check_replaceable(target, marker)
    with _own_storage_errors(target), _partial(target) as partial:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        _check_replaceable(target, marker)
        _publish(partial, target)
        sync(target.parent)


def _check_replaceable(target: Path, marker: str | None) -> None:
    with storage_errors(target):
        if target.exists() and not target.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if marker is None or not target.is_dir() or (target / marker).is_file() or not any(target.iterdir()):
            return
    raise StorageFailed(
        f"cannot write {target}: it is a folder of other things (it holds no {marker})",
        where=[str(target)],
        hint="choose another path, or remove the folder yourself",
    )


def _publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name; an old one ends under the partial name, or under that name and ``.old``."""
    while True:
        try:
            _exchange(partial, target)
            return
        except FileNotFoundError:
            pass  # there is no old one
        except OSError as exc:
            if exc.errno not in _NO_EXCHANGE:
                raise
            _step_aside(partial, target)
            return
        try:
            partial.rename(target)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was quicker: exchange with his
                raise


def _step_aside(partial: Path, target: Path) -> None:
    old = partial.with_name(partial.name + _OLD)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if os.path.lexists(old):
            old.rename(target)
        raise


def _exchange(a: Path, b: Path) -> None:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as exc:  # macOS, old C libraries
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(b)) from exc
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(b))


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder that is removed at the end; what dead runs left in ``parent`` is removed first.

    Raises:
        StorageFailed: The folder cannot be written. Other errors of the body pass through.
    """
    with storage_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
    target = parent / "scratch"
    with _own_storage_errors(target), _partial(target) as partial:
        partial.mkdir()
        yield partial
