"""Blobs to and from a real registry, over a network that breaks."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cnncc_runtime.digests import digest_file
from cnncc_runtime.errors import NetworkFailed, NotInRegistry, Paused, StorageFailed, VerificationFailed
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.transfer import Pace, download, upload
from tests.oci import registries
from tests.oci.registries import Fault, FaultProxy, Registry

BINARY = "application/octet-stream"
MIB = 1 << 20


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def of(data: bytes) -> Descriptor:
    return Descriptor(BINARY, "sha256:" + hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture(scope="module")
def blob(registry: Registry) -> tuple[bytes, Descriptor]:
    """Three megabytes in the registry."""
    data = noise(3 * MIB)
    assert upload(registry.repository(), data, of(data))
    return data, of(data)


@pytest.mark.parametrize("size", [0, 1, 2, 5000, 16 * MIB, 16 * MIB + 1, 40 * MIB])
def test_what_was_uploaded_is_downloaded(registry: Registry, tmp_path: Path, size: int) -> None:
    data = noise(size, size)
    (tmp_path / "source").write_bytes(data)
    repository = registry.repository()
    told: list[int] = []
    for source in (tmp_path / "source", data):
        sent = upload(repository, source, of(data), progress=told.append)
        assert sent == (source is not data), "what is there is not sent again"
    assert sum(told) == size
    told.clear()
    download(repository, of(data), tmp_path / "part", progress=told.append)
    assert (tmp_path / "part").read_bytes() == data
    assert sum(told) == size


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_download_goes_on_where_it_broke_off(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path, kind: str
) -> None:
    data, descriptor = blob
    faults = [Fault(kind, at) for at in (100, MIB, 0, MIB // 2, MIB)]
    came: list[int] = []
    with FaultProxy(registry.port, *faults) as proxy:
        repository = registry.repository(port=proxy.port)
        download(repository, descriptor, tmp_path / "part", pace=Pace(sleep=lambda _: None), progress=came.append)
        assert proxy.left == 0
    assert (tmp_path / "part").read_bytes() == data
    assert sum(came) == len(data), "no byte was fetched twice"


@pytest.mark.parametrize("have", [0, 1, MIB, 3 * MIB - 1, 3 * MIB])
def test_what_an_earlier_process_fetched_is_kept(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path, have: int
) -> None:
    data, descriptor = blob
    (tmp_path / "part").write_bytes(data[:have])
    came: list[int] = []
    download(registry.repository(), descriptor, tmp_path / "part", progress=came.append)
    assert (tmp_path / "part").read_bytes() == data
    assert sum(came) == len(data) - have


@pytest.mark.parametrize("left", [b"others", noise(3 * MIB, 2), noise(3 * MIB) + b"more"])
def test_what_something_else_left_does_no_harm(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path, left: bytes
) -> None:
    data, descriptor = blob
    (tmp_path / "part").write_bytes(left)
    try:
        download(registry.repository(), descriptor, tmp_path / "part")
    except VerificationFailed:
        assert not (tmp_path / "part").exists()
        download(registry.repository(), descriptor, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == data


def test_a_changed_byte_is_found_and_the_file_is_gone(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path
) -> None:
    with (
        FaultProxy(registry.port, Fault("flip", 2 * MIB)) as proxy,
        pytest.raises(VerificationFailed, match="gave other bytes"),
    ):
        download(registry.repository(port=proxy.port), blob[1], tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["changed", "shorter", "empty"])
def test_a_blob_that_was_tampered_with_on_the_registrys_disk_is_never_taken(tmp_path: Path, how: str) -> None:
    data = noise(MIB)
    with registries.registry(tmp_path / "registry") as own:
        repository = own.repository()
        upload(repository, data, of(data))
        changed = {"changed": data[:-1] + b"!", "shorter": data[:1000], "empty": b""}
        own.blob(of(data).digest).write_bytes(changed[how])
        with pytest.raises((VerificationFailed, NetworkFailed)):
            download(repository, of(data), tmp_path / "part", pace=Pace(sleep=lambda _: None))
        # what is left, if anything, is a beginning of what was asked for, never a file of the right size
        assert not (tmp_path / "part").exists() or (tmp_path / "part").stat().st_size < len(data)


def test_a_network_that_never_gives_a_byte_is_given_up(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path
) -> None:
    with FaultProxy(registry.port, always=Fault("cut")) as proxy, pytest.raises(NetworkFailed):
        download(registry.repository(port=proxy.port), blob[1], tmp_path / "part", pace=Pace(sleep=lambda _: None))


def test_a_download_keeps_to_its_rate(registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    download(
        registry.repository(), blob[1], tmp_path / "part", pace=Pace(rate=MIB / 2, clock=lambda: now[0], sleep=sleep)
    )
    assert now[0] == pytest.approx(6.0, rel=0.1)


def test_a_download_that_is_not_wanted_any_more_is_kept_for_later(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path
) -> None:
    answers = iter([True, True, True, False])
    with pytest.raises(Paused):
        download(registry.repository(), blob[1], tmp_path / "part", pace=Pace(wanted=lambda: next(answers)))
    have = (tmp_path / "part").stat().st_size
    assert 0 < have < blob[1].size
    came: list[int] = []
    download(registry.repository(), blob[1], tmp_path / "part", progress=came.append)
    assert sum(came) == blob[1].size - have


def test_a_blob_that_is_not_there_is_not_waited_for(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotInRegistry):
        download(registry.repository(), of(b"never stored"), tmp_path / "part")


def test_a_full_disk_is_said_and_leaves_what_was_fetched_for_later(
    registry: Registry, blob: tuple[bytes, Descriptor], tmp_path: Path
) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from cnncc_runtime.errors import StorageFailed
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import download
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
place = place_of(sys.argv[1], "vision")
blob = Descriptor("a/b", sys.argv[2], int(sys.argv[3]))
try:
    download(Repository(place, Connection(place.host)), blob, Path(sys.argv[4]))
except StorageFailed as exc:
    sys.exit(exc.exit_code)
"""
    arguments = [registry.url, blob[1].digest, str(blob[1].size), str(tmp_path / "part")]
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == StorageFailed.exit_code
    assert blob[0].startswith((tmp_path / "part").read_bytes())


@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("at", [0, 200])
def test_an_upload_survives_connections_that_break(tmp_path: Path, kind: str, at: int) -> None:
    data = noise(40 * MIB, 5)
    with registries.registry(tmp_path / "registry") as own:
        with FaultProxy(own.port, *[Fault(kind, at)] * 3) as proxy:
            assert upload(own.repository(port=proxy.port), data, of(data))
            assert proxy.left == 0
        download(own.repository(), of(data), tmp_path / "part")
        assert (tmp_path / "part").read_bytes() == data


def test_a_source_that_changed_is_not_published(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"other")
    with pytest.raises(VerificationFailed, match="source was changed"):
        upload(registry.repository(), tmp_path / "source", of(b"same?"))
    assert not registry.repository().has_blob(of(b"other").digest)


FETCH = """
import sys
from pathlib import Path
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import download
place = place_of(sys.argv[1], "vision")
blob = Descriptor("a/b", sys.argv[2], int(sys.argv[3]))
download(Repository(place, Connection(place.host)), blob, Path(sys.argv[4]))
print(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


def peak(registry: Registry, size: int, folder: Path) -> int:
    """Return the KiB that a process takes which downloads so many MiB."""
    path = folder / f"{size}"
    with path.open("wb") as file:
        for _ in range(size):
            file.write(noise(MIB, size))
    descriptor = Descriptor(BINARY, digest_file(path), path.stat().st_size)
    upload(registry.repository(), path, descriptor)
    arguments = [registry.url, descriptor.digest, str(descriptor.size), str(folder / "part")]
    done = subprocess.run([sys.executable, "-c", FETCH, *arguments], check=True, capture_output=True, text=True)
    (folder / "part").unlink()
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_blob(registry: Registry, tmp_path: Path) -> None:
    small, large = (peak(registry, size, tmp_path) for size in (1, 500))
    assert large < small + 4096, f"{small} KiB, {large} KiB"
    assert large < 40 << 10
