"""A lab on this machine's loopback: TVM's own RPC servers and tracker, and a server on an emulated AArch64."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cnncc.compiler.remote.address import BoardAddress
from cnncc.compiler.remote.tracker import listed_keys
from tests.qemu.board import Board

THREADS = 2
_PATIENCE = 120.0


@dataclass(frozen=True)
class Running:
    """A server or a tracker.

    Attributes:
        port: On 127.0.0.1.
        process: Leads its group.
        log: What it and its sessions said.
    """

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and to all of its sessions."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait_for(self, text: str) -> None:
        """Wait until it says something."""
        until = time.monotonic() + _PATIENCE
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def tracker(log: Path) -> Iterator[Running]:
    """TVM's tracker."""
    with _python("rpc_tracker", log, []) as running:
        yield running


@contextlib.contextmanager
def server(log: Path, *, register: Running | None = None, key: str = "") -> Iterator[Running]:
    """TVM's server with as many threads as `THREADS`; registered with a tracker where one is given."""
    arguments = ["--key", key, "--tracker", register.address] if register else []
    with _python("rpc_server", log, arguments) as running:
        if register is not None:
            _wait_until_listed(register, key)
        yield running


def _wait_until_listed(tracker: Running, key: str) -> None:
    until = time.monotonic() + _PATIENCE
    while key not in listed_keys(BoardAddress("127.0.0.1", tracker.port, key)):
        assert time.monotonic() < until, tracker.said
        time.sleep(0.05)


@contextlib.contextmanager
def emulated_server(board: Board, modalias: str, log: Path) -> Iterator[Running]:
    """`tests/qemu/server.c` on an emulated board whose kernel says ``modalias``."""
    command = [*board.command(modalias), str(board.server()), *board.libraries(), str(board.folder)]
    with _running(command, log) as process:
        running = Running(0, process, log)
        running.wait_for("\n")
        yield Running(int(running.said.split()[0]), process, log)


@contextlib.contextmanager
def relay(port: int, old: bytes, new: bytes) -> Iterator[int]:
    """Forward one connection to a port, with one text that the client sends replaced; yields the relay's port."""
    assert len(old) == len(new)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward() -> None:
            with (
                contextlib.suppress(OSError),
                listener.accept()[0] as client,
                socket.create_connection(("127.0.0.1", port)) as upstream,
            ):
                threading.Thread(target=_pump, args=(upstream, client), daemon=True).start()
                while data := client.recv(1 << 16):
                    upstream.sendall(data.replace(old, new))

        threading.Thread(target=forward, daemon=True).start()
        yield listener.getsockname()[1]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


@contextlib.contextmanager
def _python(module: str, log: Path, arguments: list[str]) -> Iterator[Running]:
    port = free_port()
    place = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    command = [sys.executable, "-m", f"tvm.exec.{module}", *place, *arguments]
    with _running(command, log) as process:
        running = Running(port, process, log)
        running.wait_for("bind to")
        yield running


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "TVM_NUM_THREADS": str(THREADS)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
