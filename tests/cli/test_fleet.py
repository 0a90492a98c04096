"""A fleet's life at the command line: keys, releases, promotion, a device beside it, and what is refused."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import cnncc_runtime
from cnncc.cli.fleet_options import PASSPHRASE, PIN, passphrase
from cnncc.fleet.home import open_fleet
from cnncc.fleet.lock import Holder
from cnncc.fleet.signers import TOKEN
from cnncc_runtime.agent.cli import cli as agent
from cnncc_runtime.agent.reports import FAILED, INSTALLED, Report, Spool
from cnncc_runtime.bundle import read_bundle, write_bundle
from cnncc_runtime.errors import UsageError
from tests.cli.conftest import Digits
from tests.cli.harness import Outcome, call, start
from tests.fleet.test_ceremony import SECRET, held_key
from tests.oci import registries
from tests.oci.registries import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with registries.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the publisher's fleets."""
    monkeypatch.setenv("CNNCC_FLEET_HOME", str(tmp_path / "fleets"))
    monkeypatch.setenv(PASSPHRASE, "a long passphrase")
    registries.impatient(monkeypatch)
    return tmp_path / "fleets"


def begin(registry: Registry) -> Outcome:
    return call("fleet", "trust", "init", "--registry", registry.url, "--name", "digits")


def device(folder: Path, *arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(agent, ["--folder", str(folder), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def rebuilt(bundle: Path, folder: Path, version: str) -> Path:
    """Return another build of a bundle."""
    made = read_bundle(bundle)
    path = folder / f"digits-{version}.cnncc"
    path.mkdir(parents=True)
    files = {name: (record.role, bundle / name) for name, record in made.manifest.files.items()}
    write_bundle(path, replace(made.manifest, toolchain={**made.manifest.toolchain, "build": version}), dict(files))
    return path


def test_from_a_compiled_bundle_to_a_device_that_runs_it(
    registry: Registry, home: Path, digits: Digits, tmp_path: Path
) -> None:
    said = begin(registry).stdout
    root = home / "digits" / "root.json"
    assert f"enroll devices with {root}" in said
    lab = tmp_path / "lab"
    device(lab, "enroll", "--root", root, "--registry", registry.url, "--name", "digits", "--device", "lab-1")

    dry = call("publish", digits.bundle, "--name", "digits", "--version", "1.0.0", "--dry-run").stdout
    assert "would be sent to" in dry
    assert not registry.repository("digits").has("1.0.0")
    published = call("publish", digits.bundle, "--name", "digits", "--version", "1.0.0").stdout
    assert "no device takes it before" in published
    device(lab, "once", code=10)

    call("fleet", "promote", "digits@1.0.0", "--to", "canary")
    device(lab, "once", code=10)
    promoted = call("fleet", "promote", "digits@1.0.0", "--from", "canary", "--to", "stable", "--json").document
    assert (promoted["channel"], promoted["version"], promoted["share"]) == ("stable", "1.0.0", 10000)
    assert "✓ runs release 1.0.0" in device(lab, "once")
    x = np.random.default_rng(0).random((1, 3, 28, 28), np.float32)
    with cnncc_runtime.load(lab / "state/current/bundle.cnncc") as model:
        np.testing.assert_allclose(model(x), digits.expected(x), rtol=1e-3, atol=1e-4)

    newer = rebuilt(digits.bundle, tmp_path, "1.1.0")
    flags = ("--channel", "stable", "--percent", "0")
    call("publish", newer, "--name", "digits", "--version", "1.1.0", *flags)
    assert "it is for 0 % of the devices" in device(lab, "once", code=10)
    call("fleet", "pause", "digits")
    call("fleet", "promote", "digits@1.1.0", "--to", "stable", "--percent", "100")
    assert "its rollout is paused" in device(lab, "once", code=10)
    assert "paused" in call("fleet", "status", "digits").stdout
    call("fleet", "resume", "digits")
    assert "✓ runs release 1.1.0" in device(lab, "once")
    status = call("fleet", "status", "digits", "--json").document["channels"]
    assert {(each["channel"], each["version"], each["before"]) for each in status} == {
        ("stable", "1.1.0", "1.0.0"),
        ("canary", "1.0.0", ""),
    }
    assert "1.0.0, 100 %; 1.1.0 was aborted" in call("fleet", "abort", "digits").stdout
    assert "✓ runs release 1.0.0" in device(lab, "once")
    assert "1.1.0 aborted" in call("fleet", "status", "digits").stdout
    call("fleet", "promote", "digits@1.1.0", "--to", "stable")
    assert "✓ runs release 1.1.0" in device(lab, "once")
    call("fleet", "rollback", "digits")
    assert "✓ runs release 1.0.0" in device(lab, "once")

    call("fleet", "promote", "digits@1.1.0", "--to", "stable")
    archive = tmp_path / "release.tar"
    assert "1 engines" in call("fleet", "export", "digits", "-o", archive).stdout
    assert "no channel points to" in call("fleet", "export", "digits@9", "-o", tmp_path / "no.tar", code=2).stderr
    call("fleet", "export", "digits@1.1.0", "--evidence", "-o", tmp_path / "all.tar")
    with registries.registry(tmp_path / "site") as site:
        there = ("--registry", site.url, "--root", root)
        assert "has 1.1.0 for stable" in call("fleet", "import", tmp_path / "all.tar", *there).stdout
        device(tmp_path / "far", "enroll", *there, "--name", "digits", "--device", "far-1")
        assert "✓ runs release 1.1.0" in device(tmp_path / "far", "once")
        refused = call("fleet", "import", tmp_path / "none.tar", *there, code=3)
        assert "none.tar" in refused.stderr
    registry.process.kill()
    registry.process.wait()
    assert "✓ runs release 1.1.0" in device(lab, "install", archive)


def test_keys_are_shown_rotated_and_signed_again(registry: Registry, home: Path) -> None:
    begin(registry)
    roles = {role["name"]: role for role in call("fleet", "trust", "show", "digits", "--json").document["roles"]}
    assert set(roles) == {"root", "targets", "snapshot", "timestamp", "stable", "canary", "provenance"}
    assert (roles["root"]["threshold"], len(roles["root"]["keys"]), roles["root"]["here"]) == (2, 3, 3)
    call("fleet", "trust", "rotate", "digits", "stable")
    call("fleet", "trust", "refresh", "digits")
    again = {role["name"]: role for role in call("fleet", "trust", "show", "digits", "--json").document["roles"]}
    assert again["stable"]["keys"] != roles["stable"]["keys"]
    assert again["timestamp"]["version"] == roles["timestamp"]["version"] + 2
    for path in sorted((home / "digits").glob("root-*.pem"))[:2]:
        path.rename(path.with_suffix(".away"))
    open_fleet("digits", lambda role: role).lock._write(Holder("a" * 32, "ada@lab", 0, 1 << 35, 9))
    refused = call("fleet", "trust", "refresh", "digits", code=20)
    assert "is being changed by ada@lab, since 1970-01-01 00:00:00 UTC" in refused.stderr
    assert "the lock was held by ada@lab" in call("fleet", "trust", "unlock", "digits").stdout
    assert "nobody held the lock" in call("fleet", "trust", "unlock", "digits").stdout
    refused = call("fleet", "trust", "rotate", "digits", "root", code=2)
    assert "root needs 2 keys to sign, 1 of its 3 are here" in refused.stderr
    assert "-o FILE" in refused.stderr
    assert "good for" in call("fleet", "trust", "show", "digits").stdout


def test_a_root_whose_keys_lie_apart_is_proposed_signed_and_published(
    registry: Registry, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(registry)
    root, proposal = home / "digits" / "root.json", tmp_path / "next.json"
    device(tmp_path / "lab", "enroll", "--root", root, "--registry", registry.url, "--name", "digits")
    away = sorted((home / "digits").glob("root-*.pem"))
    for path in away:
        path.rename(tmp_path / path.name)
    shown = call("fleet", "trust", "show", "digits", "--json").document["roles"]
    assert {role["name"]: role["here"] for role in shown}["root"] == 0

    assert "nothing is published yet" in call("fleet", "trust", "rotate", "digits", "targets", "-o", proposal).stdout
    sign = ("fleet", "trust", "sign", proposal, "--root", root)
    looked = call(*sign).stdout
    assert "targets, which needs 1 to sign" in looked
    assert "of the keys of root 1, 0 signed: 2 more must" in looked
    assert "1 more must" in call(*sign, "--key", tmp_path / away[0].name).stdout
    refused = call("fleet", "trust", "publish", "digits", proposal, code=2).stderr
    assert "the new root needs 2 keys of root 1 to sign, 1 did" in refused
    signed = call(*sign, "--key", tmp_path / away[1].name, "--json").document
    assert [each["enough"] for each in signed["signatures"]] == [True, True]
    assert "has root 2" in call("fleet", "trust", "publish", "digits", proposal).stdout
    device(tmp_path / "lab", "once", code=10)

    own, public = held_key(tmp_path, "holder")
    assert "--instead-of" in call("fleet", "trust", "adopt", "digits", "root", public, code=2).stderr
    leaving = shown[0]["keys"][0]
    adopted = call("fleet", "trust", "adopt", "digits", "root", public, "--instead-of", leaving[:8], "-o", proposal)
    assert "for the holders" in adopted.stdout
    [changed] = call(*sign, "--json").document["changes"]
    assert (changed["role"], changed["removed"], changed["threshold"]) == ("root", [leaving], [2, 2])
    assert f"+ {changed['added'][0]}" in call(*sign).stdout
    monkeypatch.setenv(f"{PASSPHRASE}_ROOT", SECRET.decode())
    call(*sign, "--key", own)
    monkeypatch.delenv(f"{PASSPHRASE}_ROOT")
    call(*sign, *(part for path in away if leaving[:16] not in path.name for part in ("--key", tmp_path / path.name)))
    call("fleet", "trust", "publish", "digits", proposal)
    again = {role["name"]: role for role in call("fleet", "trust", "show", "digits", "--json").document["roles"]}
    assert changed["added"][0] in again["root"]["keys"]
    assert again["root"]["version"] == 3
    device(tmp_path / "lab", "once", code=10)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    assert "does not open" in call(*sign, "--key", tmp_path / away[0].name, code=2).stderr
    assert "neither a file" in call(*sign, "--key", tmp_path / "absent.pem", code=2).stderr


def test_a_release_is_shown_with_what_is_attached_to_it_once_that_is_verified(
    registry: Registry, home: Path, digits: Digits, tmp_path: Path
) -> None:
    begin(registry)
    published = ("publish", digits.bundle, "--name", "digits", "--version", "1.0.0")
    call(*published, "--channel", "canary")
    made = read_bundle(digits.bundle)
    said = call("fleet", "show", "digits@1.0.0").stdout
    assert f"built from {made.manifest.model['source']} by cnncc {made.manifest.toolchain['cnncc']}" in said
    assert "in canary" in said
    assert "provenance, " in said
    assert "bill of materials, " in said
    shown = call("fleet", "show", "digits@1.0.0", "-o", tmp_path / "documents", "--json").document
    [engine] = shown["engines"]
    assert (engine["machine"], engine["precision"]) == (made.manifest.target.machine, "fp32")
    assert all(each["believed"] for each in engine["referrers"])
    assert {Path(path).name for path in shown["written"]} == {path.name for path in (tmp_path / "documents").iterdir()}
    [bom] = (tmp_path / "documents").glob("*.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.read_text()) is None

    again = ("fleet", "trust", "rotate", "digits", "provenance")
    call(*again)
    refused = call("fleet", "show", "digits@1.0.0", "-o", tmp_path / "none", code=30).stderr
    assert "names no such key" in refused
    assert "`cnncc publish` of the same bundles and version" in refused
    assert not (tmp_path / "none").exists()
    assert call("fleet", "show", "digits@1.0.0", "--json", code=30).document["error"] == "VerificationFailed"
    call(*published)
    call("publish", digits.bundle, "--name", "digits", "--version", "1.0.1")
    assert "no signature says that 1.0.1 is this release" in call("fleet", "show", "digits@1.0.1").stdout
    believed = call("fleet", "show", "digits@1.0.0").stdout
    assert "not believed: it is signed by" in believed, "what the old key signed is still listed"
    call("fleet", "show", "digits@2", code=20)
    assert "no channel 'provenance'" in call("fleet", "promote", "digits@1.0.0", "--to", "provenance", code=2).stderr
    reserved = ("--registry", registry.url, "--name", "other", "--channels", "stable,provenance")
    assert "cannot be a channel" in call("fleet", "trust", "init", *reserved, code=2).stderr


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("tuf", ("fleet", "status", "digits"), "cnncc[fleet]"),
        ("sqlalchemy", ("fleet", "token", "viewer", "me"), "cnncc[collector]"),
    ],
)
def test_packages_of_an_extra_that_is_not_installed_are_named(
    package: str, arguments: tuple[str, ...], extra: str, home: Path
) -> None:
    ends = f"import sys; sys.modules[{package!r}] = None; from cnncc.cli.main import main; main()"
    asked = subprocess.run([sys.executable, "-c", ends, *arguments], capture_output=True, text=True, check=False)
    assert asked.returncode == 3
    assert f"pip install '{extra}'" in asked.stderr
    helped = subprocess.run([sys.executable, "-c", ends, arguments[0], "--help"], capture_output=True, check=False)
    assert helped.returncode == 0


def test_an_agent_without_its_packages_says_what_to_install() -> None:
    ends = "import sys; sys.modules['requests'] = None; from cnncc_runtime.agent.__main__ import main; main()"
    asked = subprocess.run([sys.executable, "-c", ends, "status"], capture_output=True, text=True, check=False)
    assert asked.returncode == 3
    assert "pip install 'cnncc-runtime[fleet]'" in asked.stderr


def test_what_cannot_be_is_refused(
    registry: Registry, home: Path, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = call("publish", digits.bundle, "--name", "digits", "--version", "1.0.0", code=2)
    assert "this machine knows no fleet 'digits'" in refused.stderr
    begin(registry)
    assert (
        "holds a fleet already"
        in call("fleet", "trust", "init", "--registry", registry.url, "--name", "digits", code=2).stderr
    )
    assert "one of digits" in call("fleet", "status", "digit", code=2).stderr

    pending = tmp_path / "pending.cnncc"
    made = read_bundle(digits.bundle)
    pending.mkdir()
    files = {name: (record.role, digits.bundle / name) for name, record in made.manifest.files.items()}
    write_bundle(pending, replace(made.manifest, parity="pending"), dict(files))
    release = ("--name", "digits", "--version", "1.0.0")
    assert "nobody proved" in call("publish", pending, *release, code=1).stderr
    call("publish", pending, *release, "--unproven", pending)
    assert "not published" in call("publish", digits.bundle, *release, "--unproven", "other", code=2).stderr
    assert "has another release 1.0.0" in call("publish", digits.bundle, *release, code=2).stderr
    assert "add --channel" in call("publish", pending, *release, "--percent", "5", code=2).stderr

    assert "no channel 'beta'" in call("fleet", "promote", "digits@1.0.0", "--to", "beta", code=2).stderr
    assert "names no release" in call("fleet", "promote", "digits", "--to", "stable", code=2).stderr
    call("fleet", "promote", "digits@9", "--to", "stable", code=20)
    assert "has no release" in call("fleet", "pause", "digits", code=2).stderr
    call("fleet", "promote", "digits@1.0.0", "--to", "stable")
    assert "nothing else" in call("fleet", "rollback", "digits", code=2).stderr
    assert "no release before 1.0.0" in call("fleet", "abort", "digits", code=2).stderr
    wrong = call("fleet", "promote", "digits@1.0.0", "--to", "stable", "--selector", "sm >", code=2)
    assert "not by the rules" in wrong.stderr
    monkeypatch.setenv(PASSPHRASE, "wrong")
    assert "does not open" in call("fleet", "pause", "digits", code=2).stderr
    registry.process.kill()
    registry.process.wait()
    shutil.rmtree(registry.folder)
    assert "could not be reached" in call("fleet", "status", "digits", code=20).stderr


def test_a_rollout_that_fails_too_often_is_paused(
    registry: Registry, home: Path, digits: Digits, tmp_path: Path
) -> None:
    begin(registry)
    halt = ("--halt-on-failure-pct", "10", "--halt-after", "10")
    call("publish", digits.bundle, "--name", "digits", "--version", "1.0.0", "--channel", "stable", *halt)
    database = f"sqlite:///{tmp_path / 'fleet.db'}"
    device_token, viewer_token = (
        call("fleet", "token", kind, "lab", "--database", database).stdout.strip() for kind in ("device", "viewer")
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serving = start("fleet", "serve", "--database", database, "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    try:
        assert serving.stderr is not None
        assert url in serving.stderr.readline()
        watch = ("fleet", "watch", "digits", "--collector", url, "--token", viewer_token)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/healthz", timeout=5)
                break
        assert "no reports yet" in call(*watch).stdout
        spool = Spool(tmp_path / "reports")
        for number in range(9):
            outcome = FAILED if number < 2 else INSTALLED
            spool.add(Report("lab", "digits", "stable", outcome, "1.0.0", 1, "", float(number)))
        assert spool.send(f"{url}/reports", device_token) == 9
        # the token is of one device, which counts once
        assert "1 of 1 run it" in call(*watch).stdout
        every = call("fleet", "token", "device", "*", "--database", database).stdout.strip()
        for number in range(12):
            outcome = FAILED if number < 2 else INSTALLED
            spool.add(Report(f"d{number}", "digits", "stable", outcome, "1.0.0", 1, "", float(number), message="off"))
        spool.send(f"{url}/reports", every)
        assert "PAUSED NOW" in call(*watch, code=1).stdout
        assert "paused" in call("fleet", "status", "digits").stdout
        assert "PAUSED NOW" not in call(*watch).stdout
        refused = call("fleet", "watch", "digits", "--collector", url, "--token", device_token, code=20)
        assert "does not know the token" in refused.stderr
    finally:
        serving.send_signal(signal.SIGINT)
        serving.communicate(timeout=60)


def test_the_collector_is_open_to_nobody_without_tls(tmp_path: Path) -> None:
    said = call("fleet", "serve", "--host", "0.0.0.0", "--database", f"sqlite:///{tmp_path / 'x.db'}", code=2).stderr
    assert "tokens would pass unencrypted" in said


def test_a_tokens_pin_is_never_a_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE, "of files")
    assert passphrase("root") == "of files"
    with pytest.raises(UsageError, match="the token's PIN is needed") as caught:
        passphrase(TOKEN)
    assert PIN in caught.value.hint
    monkeypatch.setenv(PIN, "1234")
    assert passphrase(TOKEN) == "1234"
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(UsageError, match="the passphrase of stable is needed"):
        passphrase("stable")
