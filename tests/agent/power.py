"""A disk that loses power: what was not flushed may be there, half there, or gone.

Bytes of a file are durable once the file was flushed; before, the file may be empty, half, or whole. Names in a folder
are durable once that folder was flushed, which says nothing of others (POSIX; journaling file systems do more); before,
any beginning of the changes may have reached the disk, or all but one, or one alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class PowerCut(BaseException):
    """The power is gone."""


@dataclass(eq=False)
class File:
    data: bytes
    durable: bytes | None = None


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    names: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)


Node = File | Link | Folder


@dataclass(frozen=True)
class Change:
    """One step in the names of folders: what takes away and what gives, at once.

    Attributes:
        gone: Folder and name that is taken away.
        given: Folder, name and node.
    """

    gone: tuple[Folder, str] | None = None
    given: tuple[Folder, str, Node] | None = None

    @property
    def folders(self) -> list[Folder]:
        return [each[0] for each in (self.gone, self.given) if each is not None]


class SimulatedDisk:
    """A `cnncc_runtime.agent.disk.Disk` in memory.

    Attributes:
        steps: Changes so far; the one of number ``cut`` finds no power.
        skipped: Flushes that a mutant leaves out: see `flush_name`.
    """

    def __init__(self, root: Folder | None = None, *, cut: int | None = None, skipped: str = "") -> None:
        self.root = root or Folder()
        self.pending: list[Change] = []
        self.steps = 0
        self.cut = cut
        self.skipped = skipped
        self.flushed: set[str] = set()

    def _step(self) -> None:
        self.steps += 1
        if self.cut is not None and self.steps >= self.cut:
            raise PowerCut

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in filter(None, path.split("/")):
            node = node.names.get(part) if isinstance(node, Folder) else None
        return node

    def _home(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        folder = self._find(parent)
        assert isinstance(folder, Folder), f"there is no folder for {path}"
        return folder, name

    def _change(self, change: Change) -> None:
        _apply(change, lambda folder: folder.names)
        self.pending.append(change)

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    def list(self, path: str) -> list[str]:
        node = self._find(path)
        return sorted(node.names) if isinstance(node, Folder) else []

    def read(self, path: str) -> bytes | None:
        node = self._find(path)
        return node.data if isinstance(node, File) else None

    def digest(self, path: str) -> str | None:
        data = self.read(path)
        return None if data is None else "sha256:" + hashlib.sha256(data).hexdigest()

    def write(self, path: str, data: bytes) -> None:
        self._step()
        self._change(Change(given=(*self._home(path), File(data))))

    def flush(self, path: str) -> None:
        self._step()
        node = self._find(path)
        assert isinstance(node, File), path
        if not self._skips(path):
            node.durable = node.data

    def flush_folder(self, path: str) -> None:
        self._step()
        node = self._find(path)
        assert isinstance(node, Folder), path
        if self._skips(path):
            return
        for change in self.pending:
            if node in change.folders:
                _apply(change, lambda folder: folder.durable)
        self.pending = [change for change in self.pending if node not in change.folders]

    def _skips(self, path: str) -> bool:
        name = flush_name(path)
        self.flushed.add(name)
        return name == self.skipped

    def rename(self, old: str, new: str) -> None:
        self._step()
        node = self._find(old)
        assert node is not None, old
        self._change(Change(self._home(old), (*self._home(new), node)))

    def folder(self, path: str) -> None:
        self._step()
        if not self.exists(path):
            self._change(Change(given=(*self._home(path), Folder())))

    def hard_link(self, path: str, name: str) -> None:
        self._step()
        node = self._find(path)
        assert isinstance(node, File), path
        assert not self.exists(name)
        self._change(Change(given=(*self._home(name), node)))

    def link(self, target: str, name: str) -> None:
        self._step()
        assert not self.exists(name)
        self._change(Change(given=(*self._home(name), Link(target))))

    def target(self, name: str) -> str | None:
        node = self._find(name)
        return node.target if isinstance(node, Link) else None

    def remove(self, path: str) -> None:
        self._step()
        if self.exists(path):
            self._change(Change(gone=self._home(path)))

    def after_power_cuts(self) -> Iterator[SimulatedDisk]:
        """Yield every disk that may be found after the power is back."""
        count = len(self.pending)
        kept = [set(range(number)) for number in range(count + 1)]
        kept += [set(range(count)) - {number} for number in range(count - 1)]
        kept += [{number} for number in range(1, count)]
        for chosen in kept:
            for share in (0.0, 0.5, 1.0):
                yield self._found([change for at, change in enumerate(self.pending) if at in chosen], share)

    def copy(self) -> SimulatedDisk:
        """Return the same disk, of which all is durable."""
        return self._found(self.pending, 1.0)

    def _found(self, changes: list[Change], share: float) -> SimulatedDisk:
        copies: dict[int, Node] = {}
        root = _copy(self.root, copies, share)
        assert isinstance(root, Folder)
        for change in changes:
            _apply(_translated(change, copies, share), lambda folder: folder.names)
        for node in copies.values():
            if isinstance(node, Folder):
                node.durable = dict(node.names)
        return SimulatedDisk(root, skipped=self.skipped)


def flush_name(path: str) -> str:
    """Return what a flush is called: its path, with whatever is long and hexadecimal in it as ``*``."""
    parts = path.split("/")
    return "/".join("*" if len(part) >= 64 and not part.startswith(".stage") else part[:7] for part in parts)


def _apply(change: Change, names: Callable[[Folder], dict[str, Node]]) -> None:
    if change.gone is not None and change.given is not None and change.gone[1] not in names(change.gone[0]):
        return  # a rename of what never was there
    if change.gone is not None:
        names(change.gone[0]).pop(change.gone[1], None)
    if change.given is not None:
        names(change.given[0])[change.given[1]] = change.given[2]


def _copy(node: Node, copies: dict[int, Node], share: float) -> Node:
    """Return what of a node is durable; of bytes that were not flushed, a share."""
    if id(node) in copies:
        return copies[id(node)]
    made: Node
    if isinstance(node, File):
        data = node.data[: int(len(node.data) * share)] if node.durable is None else node.durable
        made = File(data, data)
    elif isinstance(node, Link):
        made = Link(node.target)
    else:
        made = copies[id(node)] = Folder()
        made.names = {name: _copy(child, copies, share) for name, child in node.durable.items()}
    copies[id(node)] = made
    return made


def _translated(change: Change, copies: dict[int, Node], share: float) -> Change:
    def folder(node: Folder) -> Folder:
        found = _copy(node, copies, share)
        assert isinstance(found, Folder)
        return found

    return Change(
        (folder(change.gone[0]), change.gone[1]) if change.gone else None,
        (folder(change.given[0]), change.given[1], _copy(change.given[2], copies, share)) if change.given else None,
    )
