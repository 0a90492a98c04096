"""Engines on a device: blobs by digest, and slots, which are bundles made of them.

    incoming/HEX.part             what is being fetched
    incoming/HEX.made             what is being made by a delta
    blobs/HEX                     whole, and verified
    slots/HEX/manifest.json       an engine's manifest in the registry; its digest names the slot
    slots/HEX/bundle.cnncc/NAME   the bundle: a hard link to each blob

A slot appears by one rename when all that is in it is durable, and is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable

from cnncc_runtime.agent.disk import Disk
from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.oci.formats import TITLE, Manifest, is_digest, read_manifest

BUNDLE = "bundle.cnncc"
_MANIFEST = "manifest.json"
FOLDERS = ("incoming", "blobs", "slots", "state")
_STAGE = ".stage-"


def hex_of(digest: str) -> str:
    """Return what a digest is called on disk."""
    assert is_digest(digest), digest
    return digest.removeprefix("sha256:")


def files_of(manifest: Manifest) -> dict[str, str]:
    """Return a bundle's files: name → digest.

    Raises:
        VerificationFailed: A name is none that a file in a bundle may have, or two are alike.
    """
    files: dict[str, str] = {}
    for layer in manifest.layers:
        name = layer.annotations.get(TITLE, "")
        if not _is_plain(name) or name in files:
            raise VerificationFailed(f"an engine's manifest names a file {name[:80]!r}, which no bundle has")
        files[name] = layer.digest
    return files


def _is_plain(name: str) -> bool:
    return (
        0 < len(name) <= 128
        and name.isascii()
        and name.isprintable()
        and not {"/", "\\", "\0"} & set(name)
        and not name.startswith((".", "-", " "))
    )


def part_of(digest: str) -> str:
    """Return the file that a blob is fetched into."""
    return f"incoming/{hex_of(digest)}.part"


def made_of(digest: str) -> str:
    """Return the file in which a blob is made of another one."""
    return f"incoming/{hex_of(digest)}.made"


def has_blob(disk: Disk, digest: str) -> bool:
    """Tell whether a blob is here, and is what its name says."""
    return disk.digest(f"blobs/{hex_of(digest)}") == digest


def admit(disk: Disk, digest: str) -> None:
    """Take what was fetched for a blob; its bytes are durable before it has its name.

    Raises:
        VerificationFailed: It is something else; it is gone then.
        StorageFailed: The disk is full or broken.
    """
    part, blob = part_of(digest), f"blobs/{hex_of(digest)}"
    disk.flush(part)
    if disk.digest(part) != digest:
        disk.remove(part)
        raise VerificationFailed(f"what was fetched is not {digest}")
    disk.rename(part, blob)  # should that be lost, the part is still there; slots link to the bytes, not to the name


def stage(disk: Disk, manifest: bytes, slot: str) -> None:
    """Make a slot of blobs that are all here; nothing where it is here and whole.

    Args:
        disk: The agent's.
        manifest: The engine's, byte for byte.
        slot: Its digest, in hex.

    Raises:
        VerificationFailed: The manifest is none that a bundle can be made of.
        StorageFailed: The disk is full or broken.
    """
    files = files_of(read_manifest(manifest))
    if is_whole(disk, slot):
        return
    if disk.exists(f"slots/{slot}"):
        disk.remove(f"slots/{slot}")
        disk.flush_folder("slots")
    staged = f"slots/{_STAGE}{slot}"
    disk.remove(staged)
    disk.folder(staged)
    disk.folder(f"{staged}/{BUNDLE}")
    for name, digest in files.items():
        disk.hard_link(f"blobs/{hex_of(digest)}", f"{staged}/{BUNDLE}/{name}")
    disk.flush_folder(f"{staged}/{BUNDLE}")
    disk.write(f"{staged}/{_MANIFEST}", manifest)
    disk.flush(f"{staged}/{_MANIFEST}")
    disk.flush_folder(staged)
    disk.rename(staged, f"slots/{slot}")
    disk.flush_folder("slots")


def is_whole(disk: Disk, slot: str) -> bool:
    """Tell whether a slot is there, no link that leads elsewhere, and every byte of it is what its manifest says."""
    folder = f"slots/{slot}/{BUNDLE}"
    if disk.target(f"slots/{slot}") is not None or disk.target(folder) is not None:
        return False
    if disk.digest(f"slots/{slot}/{_MANIFEST}") != f"sha256:{slot}":
        return False
    data = disk.read(f"slots/{slot}/{_MANIFEST}")
    try:
        files = files_of(read_manifest(data or b""))
    except VerificationFailed:
        return False
    return sorted(disk.list(folder)) == sorted(files) and all(
        disk.digest(f"{folder}/{name}") == digest for name, digest in files.items()
    )


def file_in(disk: Disk, slot: str, digest: str) -> str | None:
    """Return the file of a slot that should have a digest, which nobody has checked; None where there is none.

    Raises:
        VerificationFailed: The slot's manifest was damaged.
        StorageFailed: The disk is broken.
    """
    data = disk.read(f"slots/{slot}/{_MANIFEST}")
    files = files_of(read_manifest(data or b""))
    return next((f"slots/{slot}/{BUNDLE}/{name}" for name, found in files.items() if found == digest), None)


def collect(disk: Disk, keep: Iterable[str], wanted: Iterable[str] = ()) -> list[str]:
    """Remove slots and blobs that nothing needs, and what dead runs left.

    Args:
        disk: The agent's.
        keep: Slots that stay.
        wanted: Digests that are being fetched.

    Returns:
        What was removed: paths.
    """
    kept = set(keep)
    gone = [f"slots/{name}" for name in disk.list("slots") if name not in kept]
    needed = {hex_of(digest) for digest in wanted}
    for slot in kept:
        data = disk.read(f"slots/{slot}/{_MANIFEST}")
        if data is not None:
            needed |= {hex_of(digest) for digest in files_of(read_manifest(data)).values()}
    gone += [f"blobs/{name}" for name in disk.list("blobs") if name not in needed]
    gone += [f"incoming/{name}" for name in disk.list("incoming") if name.removesuffix(".part") not in needed]
    for path in gone:
        disk.remove(path)
    return gone
