"""Uploads that a process began and another one ends: kill -9, and what a registry forgot meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cnncc_runtime.errors import NetworkFailed, VerificationFailed
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.transfer import upload
from tests.oci import registries
from tests.oci.registries import Fault, FaultProxy, Registry
from tests.oci.test_transfer import MIB, noise, of

SIZE = 64 * MIB
PART = 16 * MIB

SEND = """
import sys
from pathlib import Path
from cnncc_runtime.oci.formats import Descriptor
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import upload
url, source, digest, size, sessions, parts = sys.argv[1:]
left = int(parts)
def told(went):
    global left
    left -= 1
    if not left:
        print("sent", flush=True)
        sys.stdin.read()
place = place_of(url, "vision")
blob = Descriptor("a/b", digest, int(size))
upload(Repository(place, Connection(place.host)), Path(source), blob, sessions=Path(sessions), progress=told)
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Registry]:
    with registries.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def proxy(own: Registry) -> Iterator[FaultProxy]:
    with FaultProxy(own.port) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Descriptor]:
    data = noise(SIZE, 7)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    return path, of(data)


def killed(proxy: FaultProxy, source: tuple[Path, Descriptor], sessions: Path, parts: int = 2) -> None:
    """Upload by way of a proxy, and kill the process when the registry has confirmed so many parts."""
    path, blob = source
    arguments = [f"http://localhost:{proxy.port}", str(path), blob.digest, str(blob.size), str(sessions), str(parts)]
    process = subprocess.Popen([sys.executable, "-c", SEND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"sent\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert proxy.went > parts * PART


def again(own: Registry, proxy: FaultProxy, source: tuple[Path, Descriptor], sessions: Path) -> int:
    """Upload again; return how many bytes went over the wire. The registry has it then, and nothing is kept."""
    path, blob = source
    before = proxy.went
    told: list[int] = []
    repository = own.repository(port=proxy.port)
    assert upload(repository, path, blob, sessions=sessions, progress=told.append)
    assert own.blob(blob.digest).read_bytes() == path.read_bytes()
    went = proxy.went - before
    assert sum(told) <= went < sum(told) + MIB
    return went


@pytest.mark.parametrize("parts", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_a_killed_process_sent_is_not_sent_again(
    own: Registry, proxy: FaultProxy, source: tuple[Path, Descriptor], tmp_path: Path, parts: int
) -> None:
    sessions = tmp_path / "uploads"
    killed(proxy, source, sessions, parts)
    assert len(list(sessions.iterdir())) == 1
    assert SIZE - parts * PART <= again(own, proxy, source, sessions) < SIZE - parts * PART + MIB
    assert list(sessions.iterdir()) == []


@pytest.mark.parametrize("how", ["expired", "inside a part", "damaged", "elsewhere", "too far"])
def test_a_session_that_is_not_known_any_more_is_begun_anew(
    own: Registry, proxy: FaultProxy, source: tuple[Path, Descriptor], tmp_path: Path, how: str
) -> None:
    sessions = tmp_path / "uploads"
    killed(proxy, source, sessions)
    [kept] = sessions.iterdir()
    said = json.loads(kept.read_bytes())
    if how == "expired":
        shutil.rmtree(own.folder / "docker/registry/v2/repositories/vision/_uploads")
    elif how == "inside a part":  # a process that is killed while it sends: the registry has taken some of it
        place = urlsplit(said["location"])
        with socket.create_connection((place.hostname or "", place.port or 0)) as other:
            head = f"PATCH {place.path}?{place.query} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {PART}\r\n"
            other.sendall(f"{head}Content-Range: {2 * PART}-{3 * PART - 1}\r\n\r\n".encode() + b"x" * MIB)
        time.sleep(0.5)
    elif how == "damaged":
        kept.write_bytes(b"{")
    elif how == "elsewhere":
        kept.write_text(json.dumps({**said, "location": "http://localhost:1/v2/vision/blobs/uploads/x"}))
    else:
        kept.write_text(json.dumps({**said, "sent": 3 * PART}))
    assert SIZE <= again(own, proxy, source, sessions) < SIZE + MIB
    assert list(sessions.iterdir()) == []


def test_a_source_that_changed_is_another_blob(
    own: Registry, proxy: FaultProxy, source: tuple[Path, Descriptor], tmp_path: Path
) -> None:
    sessions = tmp_path / "uploads"
    killed(proxy, source, sessions)
    path, blob = source
    data = path.read_bytes()[:-1] + b"!"
    path.write_bytes(data)
    repository = own.repository(port=proxy.port)
    before = proxy.went
    with pytest.raises(VerificationFailed, match="was changed"):
        upload(repository, path, blob, sessions=sessions)
    assert proxy.went - before < MIB
    upload(repository, path, of(data), sessions=sessions)
    assert proxy.went - before > SIZE
    assert own.blob(of(data).digest).read_bytes() == data
    [kept] = sessions.iterdir()
    os.utime(kept, (0, 0))
    with contextlib.suppress(VerificationFailed):
        upload(repository, noise(20 * MIB, 8), of(noise(20 * MIB, 8)), sessions=sessions)
    assert list(sessions.iterdir()) == [], "what registries have forgotten by now is swept"


def test_a_session_outlives_a_network_that_is_away(
    own: Registry, proxy: FaultProxy, source: tuple[Path, Descriptor], tmp_path: Path
) -> None:
    sessions = tmp_path / "uploads"
    killed(proxy, source, sessions)
    path, blob = source
    port = proxy.port
    proxy._always = Fault("refuse")
    with pytest.raises(NetworkFailed):
        upload(own.repository(port=port), path, blob, sessions=sessions)
    proxy._always = None
    assert again(own, proxy, source, sessions) < SIZE - 2 * PART + MIB
