"""Boards through TVM's RPC: real servers and a real tracker on loopback, and an emulated AArch64."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnncc.compiler.remote.address import BoardAddress
from cnncc.compiler.remote.engine import RemoteEngine
from cnncc_runtime.bundle import MANIFEST, Manifest, read_bundle, write_bundle
from cnncc_runtime.cpu import host_cpu
from cnncc_runtime.errors import RunFailed
from tests.cli.conftest import Digits
from tests.cli.harness import DIGITS, apart, call, leftovers
from tests.lab import THREADS, Running, emulated_server, free_port, relay, server, tracker
from tests.qemu import board as qemu

HWCAP = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm - - lrcpc dcpop - - - asimddp"
CORTEX_A76 = "cpu:type:aarch64:feature:," + ",".join(
    f"{number:04X}" for number, name in enumerate(HWCAP.split()) if name != "-"
)
CORTEX_A72 = "cpu:type:aarch64:feature:," + ",".join(f"{number:04X}" for number in (*range(8), 11))


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without a key."""
    with server(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A tracker with one board, 'lab'."""
    folder = tmp_path_factory.mktemp("lab")
    with tracker(folder / "tracker") as running, server(folder / "server", register=running, key="lab"):
        yield running


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory, weights: Path, _own_cache: None) -> Path:
    """The digits CNN in int8, for two batch sizes."""
    bundle = tmp_path_factory.mktemp("many") / "many.cnncc"
    options = ["--weights", weights, "--input-shape", "N,3,28,28", "--batch", "1,3", "--precision", "int8"]
    apart("compile", f"{DIGITS}:build", *options, "--data", "random", "--allow-slow", "-o", bundle)
    return bundle


def altered(bundle: Path, folder: Path, change: Callable[[Manifest], Manifest], engine: bytes | None = None) -> Path:
    """Write a bundle whose manifest, and perhaps engine, is another; digests are right."""
    found = read_bundle(bundle)
    files: dict[str, tuple[str, Path | bytes]] = {
        name: (record.role, found.file(name)) for name, record in found.manifest.files.items()
    }
    if engine is not None:
        files[found.manifest.engine.file] = ("engine", engine)
    path = folder / "altered.cnncc"
    path.mkdir()
    write_bundle(path, change(found.manifest), files)
    return path


# ---- what works


def test_verify_proves_a_bundle_on_a_board_and_says_which(digits: Digits, own_server: Running) -> None:
    report = call("verify", digits.bundle, "--remote", own_server.address, "--json").document
    assert report["passed"]
    assert any("on a board" in note and "x86_64" in note for note in report["notes"])
    judged = {subject["subject"]: subject["outputs"][0]["rel_l2"] for subject in report["subjects"]}
    assert 0 < judged["engine"] < 1e-4
    assert "load_module" in own_server.said, "the engine ran over there"


def test_a_pending_bundle_gets_its_verdict_from_a_board(digits: Digits, lab: Running, tmp_path: Path) -> None:
    pending = altered(digits.bundle, tmp_path, lambda manifest: replace(manifest, parity="pending"))
    outcome = call("verify", pending, "--remote", lab.address, "--key", "lab")
    assert "recorded as 'passed'" in outcome.stderr
    assert read_bundle(pending).manifest.parity == "passed"
    assert any("on a board" in note for note in json.loads((pending / "parity.json").read_text())["notes"])
    assert not leftovers(tmp_path)


def test_an_engine_that_computes_something_else_fails_on_the_board_too(
    digits: Digits, own_server: Running, tmp_path: Path
) -> None:
    weights = bytearray((digits.bundle / "weights.bin").read_bytes())
    first = np.frombuffer(weights, np.float32, 27 * 32)
    first[:] = first * np.float32(1.01)
    found = read_bundle(digits.bundle)
    files: dict[str, tuple[str, Path | bytes]] = {n: (r.role, found.file(n)) for n, r in found.manifest.files.items()}
    files["weights.bin"] = ("weights", bytes(weights))
    wrong = tmp_path / "wrong.cnncc"
    wrong.mkdir()
    write_bundle(wrong, replace(found.manifest, parity="pending"), files)
    outcome = call("verify", wrong, "--remote", own_server.address, code=1)
    assert "does not compute what the model computes" in outcome.stderr
    assert read_bundle(wrong).manifest.parity == "failed"


@pytest.mark.slow
def test_int8_and_every_batch_size_pass_on_a_board(many: Path, own_server: Running) -> None:
    report = call("verify", many, "--remote", own_server.address, "--json").document
    assert report["passed"]
    assert any("batch 3" in name for name in report["samples"])
    options = ["--remote", own_server.address, "--batch", "3", "--rounds", "2", "--min-time", "0.1"]
    measured = call("bench", many, *options, "--json").document
    assert (measured["batch"], measured["precision"]) == (3, "int8")
    assert measured["throughput"] == pytest.approx(3 / measured["engine"]["p50"])


def test_bench_times_the_engine_alone_on_a_board(digits: Digits, lab: Running, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    options = ["--remote", lab.address, "--key", "lab", "--rounds", "4", "--min-time", "0.2", "--threads", "1"]
    outcome = call("bench", digits.bundle, *options, "-o", output)
    assert "the time is the engine's alone" in outcome.stdout
    assert f"1 of {host_cpu().cores} cores, on TVM's thread pool" in outcome.stdout
    report = json.loads(output.read_text())
    assert report["schema"] == "cnncc.remote-benchmark/1"
    assert report["runs"] % 4 == 0
    engine = report["engine"]
    assert 0 < engine["minimum"] <= engine["p50"] <= engine["p90"]
    assert report["throughput"] == pytest.approx(1 / engine["p50"])
    assert report["board"]["threads"] == 1


def test_a_batch_size_that_was_not_built_is_refused(digits: Digits, own_server: Running) -> None:
    outcome = call("bench", digits.bundle, "--remote", own_server.address, "--batch", "7", code=2)
    assert "was not built for batch 7" in outcome.stderr


def test_more_threads_than_the_server_has_are_refused(digits: Digits, own_server: Running) -> None:
    options = ["--remote", own_server.address, "--threads", str(THREADS + 1)]
    outcome = call("bench", digits.bundle, *options, code=2)
    assert f"has {THREADS} threads" in outcome.stderr
    assert f"TVM_NUM_THREADS={THREADS + 1}" in outcome.stderr


# ---- what is refused before anything is sent


@pytest.mark.parametrize("host", ["192.168.0.7", "board.local", "0.0.0.0", "[2001:db8::1]"])
def test_only_loopback_is_spoken_to(digits: Digits, host: str) -> None:
    for command in ("verify", "bench"):
        outcome = call(command, digits.bundle, "--remote", f"{host}:9190", "--key", "k", code=2)
        assert "ssh -L 9190:127.0.0.1:9190" in outcome.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["verify", "--key", "k"], "give --remote"),
        (["verify", "--timeout", "3"], "give --remote"),
        (["verify", "--remote", "127.0.0.1:9", "--layers"], "--layers is for this machine only"),
        (["bench", "--remote", "127.0.0.1:9", "--against", "ort"], "peers are not on the board"),
        (["bench", "--remote", "127.0.0.1:9", "--max-latency-ratio", "ort=1"], "peers are not on the board"),
        (["verify", "--remote", "127.0.0.1"], "HOST:PORT"),
        (["verify", "--remote", "127.0.0.1:99999"], "HOST:PORT"),
    ],
)
def test_flags_that_mean_nothing_are_refused(digits: Digits, arguments: list[str], told: str) -> None:
    name, *options = arguments
    assert told in call(name, digits.bundle, *options, code=2).stderr


def test_nobody_listens(digits: Digits) -> None:
    for key in ([], ["--key", "lab"]):
        outcome = call("verify", digits.bundle, "--remote", f"127.0.0.1:{free_port()}", *key, code=3)
        assert "nobody listens" in outcome.stderr
        assert "tunnel" in outcome.stderr


def test_a_key_that_the_tracker_does_not_know(digits: Digits, lab: Running) -> None:
    outcome = call("bench", digits.bundle, "--remote", lab.address, "--key", "rasp5", code=3)
    assert "has no board 'rasp5': it has lab" in outcome.stderr


def test_a_server_where_a_tracker_should_be_and_the_other_way_round(
    digits: Digits, lab: Running, own_server: Running
) -> None:
    outcome = call("verify", digits.bundle, "--remote", own_server.address, "--key", "lab", code=3)
    assert "no TVM RPC tracker" in outcome.stderr
    assert "--key" in call("verify", digits.bundle, "--remote", lab.address, code=3).stderr


def test_features_that_the_board_lacks_are_refused_before_the_engine_is_sent(
    digits: Digits, own_server: Running, tmp_path: Path
) -> None:
    def greedy(manifest: Manifest) -> Manifest:
        return replace(manifest, target=replace(manifest.target, features=(*manifest.target.features, "sve2")))

    before = own_server.said.count("load_module")
    outcome = call("verify", altered(digits.bundle, tmp_path, greedy), "--remote", own_server.address, code=3)
    assert "lacks sve2" in outcome.stderr
    assert own_server.said.count("load_module") == before


def test_a_damaged_engine_is_refused_before_it_is_sent(digits: Digits, own_server: Running, tmp_path: Path) -> None:
    damaged = altered(digits.bundle, tmp_path, lambda manifest: manifest)
    engine = damaged / "engine.so"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    before = own_server.said.count("load_module")
    call("verify", damaged, "--remote", own_server.address, code=4)
    assert own_server.said.count("load_module") == before


def test_a_server_of_another_protocol(digits: Digits, own_server: Running) -> None:
    with relay(own_server.port, b"0.8.0", b"0.7.9") as port:
        outcome = call("verify", digits.bundle, "--remote", f"127.0.0.1:{port}", code=3)
    assert "a server of another TVM" in outcome.stderr
    assert "protocol" in outcome.stderr


def test_a_server_whose_virtual_machine_reads_another_byte_code(
    digits: Digits, own_server: Running, tmp_path: Path
) -> None:
    engine = (digits.bundle / "engine.so").read_bytes()
    assert engine.count(b"\4\0\0\0\0\0\0\0000.14") == 1, "the version of the byte code, with its length"
    older = engine.replace(b"\4\0\0\0\0\0\0\0000.14", b"\4\0\0\0\0\0\0\0000.13")
    bundle = altered(digits.bundle, tmp_path, lambda manifest: manifest, older)
    outcome = call("verify", bundle, "--remote", own_server.address, code=3)
    assert "a server of another TVM" in outcome.stderr


def test_engines_for_gpus_do_not_run_over_rpc(digits: Digits, own_server: Running, tmp_path: Path) -> None:
    def plan(manifest: Manifest) -> Manifest:
        return replace(manifest, engine=replace(manifest.engine, format="tensorrt-rtx"))

    bundle = altered(digits.bundle, tmp_path, plan)
    assert "engines for CPUs" in call("verify", bundle, "--remote", own_server.address, code=3).stderr


# ---- boards that go away


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[Running]:
    """A server that a test may kill."""
    with server(tmp_path / "frail") as running:
        yield running


def test_a_board_that_dies_in_a_run(digits: Digits, frail: Running) -> None:
    address = BoardAddress("127.0.0.1", frail.port, timeout=60.0)
    with RemoteEngine(digits.bundle, address) as engine:
        engine.run({"image": np.zeros((1, 3, 28, 28), np.float32)})
        threading.Timer(1.0, frail.signal, [signal.SIGKILL]).start()
        started = time.monotonic()
        with pytest.raises(RunFailed, match="the board went away"):
            engine.time(10_000_000)
        assert time.monotonic() - started < 20, "long before the time is up"


def test_a_board_that_died_between_runs(digits: Digits, frail: Running) -> None:
    with RemoteEngine(digits.bundle, BoardAddress("127.0.0.1", frail.port, timeout=60.0)) as engine:
        frail.signal(signal.SIGKILL)
        with pytest.raises(RunFailed, match="the board went away"):
            engine.run({"image": np.zeros((1, 3, 28, 28), np.float32)})


def test_an_engine_that_fails_on_the_board_is_told_in_its_servers_words(
    digits: Digits, own_server: Running, tmp_path: Path
) -> None:
    def misnamed(manifest: Manifest) -> Manifest:
        entries = dict.fromkeys(manifest.engine.entries, "nothing")
        return replace(manifest, engine=replace(manifest.engine, entries=entries))

    outcome = call("verify", altered(digits.bundle, tmp_path, misnamed), "--remote", own_server.address, code=5)
    assert "cannot be run on the board" in outcome.stderr
    assert "nothing" in outcome.stderr


def test_a_board_that_hangs_in_a_run_and_one_that_does_not_let_us_in(digits: Digits, frail: Running) -> None:
    with RemoteEngine(digits.bundle, BoardAddress("127.0.0.1", frail.port, timeout=3.0)) as engine:
        frail.signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RunFailed, match="did not answer within 3 s"):
            engine.run({"image": np.zeros((1, 3, 28, 28), np.float32)})
        assert 2 < time.monotonic() - started < 20
    outcome = call("bench", digits.bundle, "--remote", frail.address, "--timeout", "2", code=3)
    assert "did not take the engine within 2 s" in outcome.stderr


def test_a_board_that_somebody_else_uses(digits: Digits, lab: Running) -> None:
    with RemoteEngine(digits.bundle, BoardAddress("127.0.0.1", lab.port, "lab")):
        options = ["--remote", lab.address, "--key", "lab", "--timeout", "1"]
        assert "became free in 1 s" in call("verify", digits.bundle, *options, code=3).stderr


# ---- another machine


@pytest.fixture(scope="session")
def arm(tmp_path_factory: pytest.TempPathFactory, weights: Path, _own_cache: None) -> Path:
    """The digits CNN for a Cortex-A76; its parity is pending."""
    qemu.require()
    bundle = tmp_path_factory.mktemp("arm") / "arm.cnncc"
    options = ["--weights", weights, "--mtriple", "aarch64-linux-gnu", "--mcpu", "cortex-a76"]
    apart("compile", f"{DIGITS}:build", *options, "-o", bundle)
    return bundle


@pytest.mark.slow
def test_an_engine_for_aarch64_is_proven_on_an_emulated_board(arm: Path, tmp_path: Path) -> None:
    board = qemu.make_board(tmp_path, "cortex-a76")
    with emulated_server(board, CORTEX_A76, tmp_path / "log") as running:
        report = call("verify", arm, "--remote", running.address, "--timeout", "120", "--json").document
    assert report["passed"]
    assert read_bundle(arm).manifest.parity == "passed"


@pytest.mark.slow
def test_a_board_refuses_engines_of_another_machine_or_with_other_instructions(
    digits: Digits, arm: Path, tmp_path: Path
) -> None:
    board = qemu.make_board(tmp_path, "cortex-a72")
    with emulated_server(board, CORTEX_A72, tmp_path / "log") as running:
        other = call("verify", digits.bundle, "--remote", running.address, code=3)
        assert "built for: x86_64, found: aarch64" in other.stderr
        newer = call("verify", arm, "--remote", running.address, code=3)
        assert "lacks" in newer.stderr and "dotprod" in newer.stderr
        assert "load_module" not in running.said, "neither engine was sent"


@pytest.mark.slow
def test_a_board_that_does_not_say_what_its_cpu_can_execute(arm: Path, tmp_path: Path) -> None:
    board = qemu.make_board(tmp_path, "cortex-a76")
    with emulated_server(board, "cpu:type:x86,ven0002fam0019mod0011:feature:,0000", tmp_path / "log") as running:
        outcome = call("verify", arm, "--remote", running.address, code=3)
    assert "does not say what its CPU can execute" in outcome.stderr


def test_the_marker_of_a_bundle_is_untouched_where_a_board_is_away(digits: Digits, tmp_path: Path) -> None:
    pending = altered(digits.bundle, tmp_path, lambda manifest: replace(manifest, parity="pending"))
    before = (pending / MANIFEST).read_bytes()
    call("verify", pending, "--remote", f"127.0.0.1:{free_port()}", code=3)
    assert (pending / MANIFEST).read_bytes() == before
