"""The process that speaks to a board for us: it can be killed where the board does not answer.

What it does once: connect, look at the board's CPU, send the engine. Then it answers: arrays are a run, a record is so
many timed runs of the arrays before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cnncc.compiler.child import die_with
from cnncc.compiler.pipe import ARRAYS, ERROR, RECORD, pack, pack_error, receive, send, unpack
from cnncc.compiler.remote.board_cpu import board_cpu
from cnncc.compiler.remote.connection import ERRORS, Connection, failure
from cnncc.compiler.remote.tracker import Server
from cnncc_runtime.admission import Admission
from cnncc_runtime.bundle import Bundle, Manifest, read_bundle
from cnncc_runtime.cpu import HostCpu
from cnncc_runtime.elf import parse_elf
from cnncc_runtime.errors import BundleRefused, CnnccError, EngineMismatch
from cnncc_runtime.session import engine_mismatch
from cnncc_runtime.specs import Feeds, Tensors
from cnncc_runtime.tvm_session import check_abi, check_elf
from cnncc_runtime.weights import MappedWeights


@dataclass(frozen=True)
class BoardReport:
    """What is known of a board once the engine is there.

    Attributes:
        machine: As ELF files name it.
        model: For people.
        cores: That are online.
        features: ISA features, by LLVM's names.
        threads: Of TVM's pool on the board, on which the engine's loops run.
        connect_s: Seconds until the board had answered.
        upload_s: Seconds to send and load the engine.
    """

    machine: str
    model: str
    cores: int
    features: tuple[str, ...]
    threads: int
    connect_s: float
    upload_s: float

    def __str__(self) -> str:
        """Return it for a sentence."""
        return f"{self.model} ({self.machine}), {self.threads} of {self.cores} cores, on TVM's thread pool"


class _BoardEngine:
    """A bundle's engine on a board. Its weights go there when a batch size first needs them, expanded."""

    def __init__(self, bundle: Bundle, server: Server, threads: int | None) -> None:
        manifest = bundle.manifest
        check_abi(manifest.engine.abi)
        with bundle.open(manifest.engine.file) as file:  # size and digest are checked
            engine = file.read()
        started = time.perf_counter()
        self._board = Connection(server)
        cpu = board_cpu(self._board.read)
        _check_fit(manifest, engine, cpu)
        used = self._board.threads(threads)
        connected = time.perf_counter()
        self._machine = self._board.load(engine)
        uploaded = time.perf_counter() - connected
        features = tuple(sorted(cpu.features))
        self.report = BoardReport(cpu.machine, cpu.model, cpu.cores, features, used, connected - started, uploaded)
        self._manifest = manifest
        self._admission = Admission(manifest.inputs, manifest.batches)
        self._entry = ""
        self._sent: dict[int, Any] = {}
        record = manifest.engine.weights
        if record:
            with bundle.open(record.file) as file:
                self._weights = MappedWeights(file, record)

    def run(self, feeds: Feeds) -> Tensors:
        batch = self._admission.batch(feeds)
        manifest = self._manifest
        entry = manifest.engine.entries[batch]
        taken = manifest.engine.weights.entries[batch] if manifest.engine.weights else ()
        inputs = [self._board.upload(feeds[spec.name]) for spec in manifest.inputs]
        found = self._board.call(self._machine, entry, [*inputs, *map(self._weight, taken)])
        if len(found) != len(manifest.outputs):
            raise BundleRefused(
                f"the engine returned {len(found)} outputs, the manifest lists {len(manifest.outputs)}",
                hint="build the bundle again",
            )
        self._entry = entry
        return {spec.name: array for spec, array in zip(manifest.outputs, found, strict=True)}

    def time(self, runs: int) -> tuple[float, ...]:
        return self._board.time(self._machine, self._entry, runs)

    def _weight(self, position: int) -> Any:
        if position not in self._sent:
            self._sent[position] = self._board.upload(self._weights[position])
        return self._sent[position]


def _check_fit(manifest: Manifest, engine: bytes, cpu: HostCpu) -> None:
    """Refuse an engine that the board cannot execute.

    Raises:
        EngineMismatch: Names what it was built for, and what was found.
        BundleRefused: Not a shared library.
    """
    try:
        check_elf(parse_elf(engine, manifest.engine.file), cpu.machine, manifest.engine.file)
        if mismatch := engine_mismatch(manifest.target, cpu):
            raise mismatch
    except EngineMismatch as exc:
        hint = "compile for the board: --device, or --mtriple and --mcpu"
        raise EngineMismatch(f"the board cannot execute the engine: {exc.message}", hint=hint) from exc


def main() -> None:
    """Serve one bundle: ``board_process PARENT BUNDLE HOST PORT MATCH THREADS`` (0: all)."""
    parent, bundle, host, port, match, threads = sys.argv[1:]
    die_with(int(parent))
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        try:
            _serve(Path(bundle), Server(host, int(port), match), int(threads) or None, replies)
        except CnnccError as exc:
            send(replies, ERROR, pack_error(exc))
        except ERRORS as exc:
            send(replies, ERROR, pack_error(failure(exc)))
    # the session ended when nothing referred to it any more: a connection that the system resets instead ends the loop
    # in which TVM's server waits for others. Whoever started this process kills it where the board does not answer
    os._exit(0)


def _serve(bundle: Path, server: Server, threads: int | None, replies: BinaryIO) -> None:
    engine = _BoardEngine(read_bundle(bundle), server, threads)
    send(replies, RECORD, json.dumps(asdict(engine.report)).encode())
    while (message := receive(sys.stdin.buffer))[0]:
        kind, body = message
        if kind == ARRAYS:
            send(replies, ARRAYS, pack(engine.run(unpack(body))))
        else:
            send(replies, RECORD, json.dumps(engine.time(json.loads(body))).encode())


if __name__ == "__main__":
    main()
