"""Asks a TVM RPC tracker for a board.

The protocol is that of `tvm.rpc.tracker`: a magic number, then JSON with a length before it. TVM's own client imports
the compiler, waits a minute for ports that nobody listens on, and for ever for boards that are in use.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

from cnncc.compiler.remote.address import BoardAddress, format_address, is_loopback
from cnncc_runtime.errors import BoardUnavailable

_MAGIC = struct.Struct("<i")
_TRACKER = 0x2F271  # tvm/rpc/base.py: RPC_TRACKER_MAGIC, and the codes of TrackerCode
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6
_LONGEST = 1 << 20
"""Bytes of an answer; a line for each board."""


@dataclass(frozen=True)
class Server:
    """A server that a session can be opened with.

    Attributes:
        host: A loopback address.
        port: Its port.
        match: What it wants to hear, so that two clients never get the same board; empty where nothing.
    """

    host: str
    port: int
    match: str = ""


def find_server(board: BoardAddress) -> Server:
    """Return a board's server; a tracker reserves it for us.

    Raises:
        BoardUnavailable: There is no tracker, it knows no such board, all are in use, or the board lies elsewhere than
            on this machine's loopback.
    """
    if not board.key:
        return Server(board.host, board.port)
    where = format_address(board.host, board.port)
    try:
        with socket.create_connection((board.host, board.port), timeout=board.timeout) as tracker:
            _greet(tracker)
            keys = _keys(_ask(tracker, [_SUMMARY]))
            if board.key not in keys:
                known = f"it has {', '.join(keys)}" if keys else "it has none"
                raise BoardUnavailable(
                    f"the tracker at {where} has no board '{board.key}': {known}",
                    hint="start the board's server with this --key, or give one of those",
                )
            host, port, match = _place(_ask(tracker, [_REQUEST, board.key, "", 1]))
    except TimeoutError as exc:
        raise BoardUnavailable(
            f"no board '{board.key}' of the tracker at {where} became free in {board.timeout:g} s",
            hint="somebody else uses it: wait, or give a longer --timeout",
        ) from exc
    except ConnectionRefusedError as exc:
        raise BoardUnavailable(
            f"nobody listens at {where}", hint="is the tunnel open, and the tracker started?"
        ) from exc
    except (OSError, ValueError) as exc:
        raise BoardUnavailable(
            f"what listens at {where} is no TVM RPC tracker: {exc}", hint="leave --key out to speak to a server"
        ) from exc
    if not is_loopback(host):
        raise BoardUnavailable(
            f"the tracker has '{board.key}' at {format_address(host, port)}, which is not this machine's loopback",
            hint=f"start the board's server with --custom-addr 127.0.0.1, and tunnel its port {port} too",
        )
    return Server(host, port, match)


def listed_keys(tracker: BoardAddress) -> list[str]:
    """Return the keys of the boards that a tracker has.

    Raises:
        OSError: It cannot be reached.
        ValueError: It is no tracker.
    """
    with socket.create_connection((tracker.host, tracker.port), timeout=tracker.timeout) as connection:
        _greet(connection)
        return _keys(_ask(connection, [_SUMMARY]))


def _greet(tracker: socket.socket) -> None:
    tracker.sendall(_MAGIC.pack(_TRACKER))
    try:
        answer = _MAGIC.unpack(_read(tracker, _MAGIC.size))
    except TimeoutError as exc:
        raise ConnectionError("it does not answer") from exc
    if answer != (_TRACKER,):
        raise ValueError("it answers otherwise")


def _ask(tracker: socket.socket, question: list[Any]) -> Any:
    body = json.dumps(question).encode()
    tracker.sendall(_MAGIC.pack(len(body)) + body)
    [length] = _MAGIC.unpack(_read(tracker, _MAGIC.size))
    if not 0 < length <= _LONGEST:
        raise ValueError("its answer is too long")
    answer = json.loads(_read(tracker, length))
    if not isinstance(answer, list) or len(answer) != 2 or answer[0] != _SUCCESS:
        raise ValueError(f"it answers {answer!r}")
    return answer[1]


def _keys(summary: Any) -> list[str]:
    """Return the keys of the servers that are there; the queue's list also names those that left."""
    try:
        return sorted({str(server["key"]).removeprefix("server:") for server in summary["server_info"]})
    except (TypeError, KeyError) as exc:
        raise ValueError("it does not say which boards it has") from exc


def _place(answer: Any) -> tuple[str, int, str]:
    try:
        host, port, match = answer
        return str(host), int(port), str(match)
    except TypeError as exc:
        raise ValueError("it does not say where the board is") from exc


def _read(tracker: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = tracker.recv(size - len(data))
        if not part:
            raise ConnectionResetError("it hung up")
        data += part
    return data
