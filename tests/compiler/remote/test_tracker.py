"""What a tracker may answer; a real one answers in tests/cli/test_remote.py."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from cnncc.compiler.remote.address import BoardAddress, parse_address
from cnncc.compiler.remote.tracker import Server, find_server
from cnncc_runtime.errors import BoardUnavailable, UsageError

MAGIC = struct.pack("<i", 0x2F271)
SUMMARY = json.dumps([0, {"server_info": [{"key": "server:lab"}], "queue_info": {"old": {}}}]).encode()


def framed(body: bytes) -> bytes:
    return struct.pack("<i", len(body)) + body


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[BoardAddress]:
    """A tracker that gives these answers whatever it is asked, then waits."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as client:
                for answer in answers:
                    client.recv(4096)
                    client.sendall(answer)
                done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield BoardAddress("127.0.0.1", listener.getsockname()[1], "lab", timeout=1.0)
        finally:
            done.set()
            thread.join()


def test_a_board_on_loopback_is_found() -> None:
    place = framed(json.dumps([0, ["127.0.0.1", 9091, "lab:0.5"]]).encode())
    with answering(MAGIC, framed(SUMMARY), place) as board:
        assert find_server(board) == Server("127.0.0.1", 9091, "lab:0.5")


def test_a_board_elsewhere_is_refused_and_the_port_to_tunnel_is_named() -> None:
    place = framed(json.dumps([0, ["192.168.0.7", 9091, "lab:0.5"]]).encode())
    with answering(MAGIC, framed(SUMMARY), place) as board, pytest.raises(BoardUnavailable) as caught:
        find_server(board)
    assert "192.168.0.7:9091" in caught.value.message
    assert "9091" in caught.value.hint


@pytest.mark.parametrize(
    "answers",
    [
        [b"HTTP"],
        [b"\0"],
        [MAGIC, struct.pack("<i", -1)],
        [MAGIC, struct.pack("<i", 1 << 30)],
        [MAGIC, framed(b"{")],
        [MAGIC, framed(b"[-1, 0]")],
        [MAGIC, framed(b"[0, 7]")],
        [MAGIC, framed(SUMMARY), framed(b"[0, 7]")],
        [MAGIC, framed(SUMMARY), framed(b'[0, ["127.0.0.1", "x", ""]]')],
    ],
)
def test_what_answers_otherwise_is_no_tracker(answers: list[bytes]) -> None:
    with answering(*answers) as board, pytest.raises(BoardUnavailable):
        find_server(board)


def test_what_says_nothing_is_not_taken_for_a_busy_tracker() -> None:
    with answering() as board, pytest.raises(BoardUnavailable, match="does not answer"):
        find_server(board)


def test_a_board_that_does_not_become_free_is_waited_for_as_long_as_allowed() -> None:
    with answering(MAGIC, framed(SUMMARY)) as board, pytest.raises(BoardUnavailable, match="became free in 1 s"):
        find_server(board)


def test_without_a_key_nobody_is_asked() -> None:
    assert find_server(BoardAddress("::1", 9090)) == Server("::1", 9090)


@pytest.mark.parametrize(
    ("text", "host"), [("127.0.0.1:9190", "127.0.0.1"), ("localhost:9190", "localhost"), ("[::1]:9190", "::1")]
)
def test_addresses(text: str, host: str) -> None:
    assert parse_address(text, "lab") == BoardAddress(host, 9190, "lab")


@pytest.mark.parametrize("text", ["", "9190", ":9190", "::1:9190", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:x", "a b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@pytest.mark.parametrize("key", ["a b", "a:b", "a\nb"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(UsageError, match="key"):
        parse_address("127.0.0.1:9190", key)
