"""Doctor's look at the ports of TVM's RPC."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnncc.compiler.doctor import examine, open_ports

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def row(address: str, port: int, *, state: str = "0A", user: int = 7) -> str:
    return f"   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000  {user}  0 1 1 0\n"


def test_only_this_users_listeners_at_the_ports_of_tvm_that_others_reach() -> None:
    table = HEAD + "".join(
        [
            row("00000000", 9090),
            row("0100007F", 9091),
            row("0700A8C0", 9190),
            row("00000000", 9092, user=8),
            row("00000000", 9093, state="01"),
            row("00000000", 8080),
            row("00000000000000000000000000000000", 9199),
            row("00000000000000000000000001000000", 9094),
            row("0000000000000000FFFF00000100007F", 9095),
        ]
    )
    assert open_ports(table, 7) == [9090, 9190, 9199]
    assert open_ports("", 7) == []


@contextlib.contextmanager
def listening(host: str) -> Iterator[int]:
    for port in range(9199, 9089, -1):
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            yield port
            return
    pytest.skip("all ports of TVM's RPC are taken here")


def test_doctor_warns_of_a_port_that_is_open_and_not_of_one_on_loopback(tmp_path: Path) -> None:
    def warned() -> list[str]:
        return [finding.detail for finding in examine(tmp_path) if finding.name == "rpc"]

    with listening("127.0.0.1") as port:
        assert not any(f"port {port} " in detail for detail in warned())
    with listening("0.0.0.0") as port:
        [detail] = [detail for detail in warned() if f"port {port} " in detail]
    assert "may be TVM's RPC" in detail
