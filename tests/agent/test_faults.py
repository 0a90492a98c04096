"""Disks that are full, registries that lost what they had, engines and files that mean harm, agents that are killed."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cnncc_runtime.agent import slots
from cnncc_runtime.agent.activation import TRIES, current, read_state
from cnncc_runtime.agent.cli import cli
from cnncc_runtime.agent.clock import Clock
from cnncc_runtime.agent.trial import Verdict, try_engine
from cnncc_runtime.agent.update import Agent
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import (
    HealthCheckFailed,
    NetworkFailed,
    NotInRegistry,
    StorageFailed,
    VerificationFailed,
)
from cnncc_runtime.oci.transfer import Pace, download, upload
from tests.agent.test_agent_cli import Device, enrolled
from tests.agent.test_trial import UD2, with_code
from tests.agent.test_update import Fleet, engine, fleet, own, runs
from tests.oci import registries
from tests.oci.registries import LOGIN, PROGRAM, Fault, FaultProxy
from tests.oci.test_transfer import noise, of
from tests.oci.tokens import token_server

__all__ = ["engine", "fleet", "own"]

AGENT = [sys.executable, "-m", "cnncc_runtime.agent", "--folder"]
ENDLESS = b"\xeb\xfe"  # jmp to itself (Intel SDM)


class FullDisk:
    """Has a folder's disk be full from some change on: what would take space fails, what frees it does not.

    Python tells audit hooks of every file that is opened, and of folders and links that are made, before it is
    (Python's documentation, "Audit events table"): those of libraries, too. A hook stays for as long as the process, so
    there is one for all.
    """

    _HOOKED: FullDisk | None = None
    _ADDED = False

    def __init__(self, folder: Path, at: int) -> None:
        self.folder = str(folder)
        self.left = at

    def __enter__(self) -> FullDisk:
        if not FullDisk._ADDED:
            sys.addaudithook(FullDisk._heard)
            FullDisk._ADDED = True
        FullDisk._HOOKED = self
        return self

    def __exit__(self, *_: object) -> None:
        FullDisk._HOOKED = None

    @staticmethod
    def _heard(event: str, arguments: tuple[Any, ...]) -> None:
        disk = FullDisk._HOOKED
        if disk is not None and event in ("open", "os.mkdir", "os.link", "os.symlink", "os.rename"):
            disk._change(event, arguments)

    def _change(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[1] if event in ("os.link", "os.symlink", "os.rename") else arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.folder):
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & writes):
            return
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

    @property
    def was_full(self) -> bool:
        return self.left < 0


def healthy(_: Path) -> Verdict:
    return Verdict((), 0.01, 5)


def version_shown(agent: Agent) -> str:
    """Return which release applications load, which is whole."""
    disk = agent.disk()
    shown = current(disk)
    assert slots.is_whole(disk, shown)
    return (agent.root / "state/current/bundle.cnncc/weights.bin").read_bytes()[:5].decode()


@pytest.mark.slow
@pytest.mark.parametrize("second_is_good", [True, False])
def test_a_disk_that_is_full_at_any_step_leaves_a_good_engine_and_space_mends_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, second_is_good: bool
) -> None:
    (fleet.folder / "token").write_text("t")
    device = enrolled(fleet, "--report", "http://localhost:9/reports", "--report-token", fleet.folder / "token")
    tried = healthy if second_is_good else lambda _: Verdict(("it is wrong",))
    monkeypatch.setattr("cnncc_runtime.agent.cli.Agent", functools.partial(Agent, try_engine=healthy))
    fleet.release("1.0.0")
    device("once")
    fleet.release("1.1.0")
    monkeypatch.setattr("cnncc_runtime.agent.cli.Agent", functools.partial(Agent, try_engine=tried))
    kept = device.folder.with_name("kept")
    device.folder.rename(kept)
    good = {"1.0.0", "1.1.0"} if second_is_good else {"1.0.0"}
    codes = []
    for step in range(1000):
        shutil.rmtree(device.folder, ignore_errors=True)
        shutil.copytree(kept, device.folder, symlinks=True)
        agent = fleet.device("cli-device")
        with FullDisk(device.folder, step) as disk:
            codes.append(exit_code(device, "once", "--on-change", "true"))
        assert version_shown(agent) in good, step
        if not disk.was_full:
            break
        after = exit_code(device, "once", "--on-change", "true")
        assert after in ({0, 10} if second_is_good else {10, 50}), f"{step}: {after}"
        assert version_shown(agent) == ("1.1.0" if second_is_good else "1.0.0"), step
    assert step > 40
    done = 0 if second_is_good else 50
    # the last steps are those of what the device tells: that they fail changes nothing
    assert codes[-1] == done
    told = codes.index(done)
    assert set(codes[:told]) == {StorageFailed.exit_code}
    assert set(codes[told:]) == {done}


def exit_code(device: Device, *arguments: str) -> int:
    result = CliRunner().invoke(cli, ["--folder", str(device.folder), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


FETCH_ON_A_SMALL_DISK = """
import sys
from dataclasses import replace
from pathlib import Path
from cnncc_runtime.agent.trial import Verdict
from cnncc_runtime.agent.update import Agent, host_hardware
from cnncc_runtime.errors import CnnccError
agent = Agent(Path(sys.argv[1]), try_engine=lambda _: Verdict((), 0.01, 5))
agent.hardware = lambda root, profile: replace(host_hardware(root, profile), free=1 << 40)
try:
    agent.once()
except CnnccError as exc:
    print(exc, file=sys.stderr)
    sys.exit(exc.exit_code)
"""


@pytest.mark.slow
def test_a_small_disk_that_fills_up_in_mid_write_leaves_a_good_engine(fleet: Fleet, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no file system can be mounted: needs root")
    try:
        agent = fleet.device("small/device")
        fleet.release("1.0.0")
        assert agent.once().changed
        fleet.release("1.1.0")
        codes = []
        for free in (0, 4, 64, 256, 900, 1000, 1040, 1100):
            filler = disk / "filler"
            filler.unlink(missing_ok=True)
            left = shutil.disk_usage(disk).free - (free << 10)
            with filler.open("wb") as file:
                file.write(b"\0" * left)
            command = [sys.executable, "-c", FETCH_ON_A_SMALL_DISK, str(agent.root)]
            codes.append(subprocess.run(command, check=False, capture_output=True).returncode)
            assert runs(agent) in ("1.0.0", "1.1.0")
        assert codes[0] == StorageFailed.exit_code
        assert set(codes) <= {0, StorageFailed.exit_code}
        filler.unlink()
        agent.once()
        assert runs(agent) == "1.1.0"
    finally:
        subprocess.run(["umount", disk], check=True)


def collect_garbage(fleet: Fleet) -> None:
    """Have a registry remove what no tag leads to, as its operator does."""
    config = fleet.registry.folder / "config.yml"
    command = [PROGRAM, "garbage-collect", "--delete-untagged", str(config)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def untag(fleet: Fleet, version: str) -> None:
    """Take a release's tags away, as a registry's rule of retention does."""
    manifests = fleet.registry.folder / "docker/registry/v2/repositories" / fleet.name / "_manifests"
    for tag in (manifests / "tags").glob(f"{version}*"):
        shutil.rmtree(tag)


def test_a_registry_that_collects_garbage_keeps_what_was_published(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    collect_garbage(fleet)
    assert agent.once().changed
    fleet.release("1.1.0")
    collect_garbage(fleet)
    assert agent.once().changed
    fleet.point("1.0.0")
    collect_garbage(fleet)
    assert agent.once().changed
    assert runs(agent) == "1.0.0"


def test_a_registry_that_lost_the_release_that_runs_changes_nothing(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    untag(fleet, "1.0.0")
    collect_garbage(fleet)
    with pytest.raises(NotInRegistry):
        fleet.registry.repository(fleet.name).manifest("1.0.0")
    assert agent.once().why == "the device has had it"
    assert runs(agent) == "1.0.0"
    fleet.release("1.1.0")
    assert agent.once().changed


def test_a_registry_that_lost_the_release_to_come_is_said_and_publishing_it_again_mends_it(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    bundle = fleet.bundle("1.1.0")
    fleet.release("1.1.0", bundle)
    untag(fleet, "1.1.0")
    collect_garbage(fleet)
    with pytest.raises(NotInRegistry):
        agent.once()
    assert runs(agent) == "1.0.0"
    assert read_state(agent.disk()).bad == ()
    fleet.release("1.1.0", bundle)
    assert agent.once().changed
    assert runs(agent) == "1.1.0"


def test_blobs_that_vanish_in_mid_update_are_said_and_what_came_is_kept(fleet: Fleet, engine: Path) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    path = fleet.registry.blob(digest_bytes(b"1.0.0" * 200_000))
    aside = path.rename(path.with_name("aside"))
    with pytest.raises((NotInRegistry, NetworkFailed)):
        agent.once()
    assert current(agent.disk()) == ""
    kept = {blob.name for blob in (agent.root / "blobs").iterdir()}
    assert digest_bytes(engine.read_bytes()).removeprefix("sha256:") in kept
    aside.rename(path)
    assert agent.once().changed


KILLS_THE_AGENT = """
import os, signal, sys
from pathlib import Path
from cnncc_runtime.agent.update import Agent
def deadly(bundle):
    os.kill(os.getpid(), signal.SIGKILL)
Agent(Path(sys.argv[1]), try_engine=deadly).once()
"""


def test_an_engine_that_kills_the_agent_is_tried_so_often_and_no_more(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    fleet.release("1.1.0")
    codes = [
        subprocess.run([sys.executable, "-c", KILLS_THE_AGENT, str(agent.root)], check=False).returncode
        for _ in range(TRIES + 2)
    ]
    assert codes == [-signal.SIGKILL] * TRIES + [0, 0], "then it is refused, and the agent works on"
    assert runs(agent) == "1.0.0"
    assert len(read_state(agent.disk()).bad) == 1


@pytest.mark.slow
def test_a_service_that_is_killed_fifty_times_always_leaves_a_good_engine(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    random = np.random.default_rng(7)
    versions = {"1.0.0"}
    killed = {"trial": 0, "before": 0, "after": 0}
    for number in range(54):
        if number % 3 == 0:
            latest = f"1.{number + 1}.0"
            fleet.release(latest)
            versions.add(latest)
        process = subprocess.Popen([*AGENT, str(agent.root), "run", "--interval", "1"], stderr=subprocess.DEVNULL)
        time.sleep(float(random.uniform(0.2, 3.0)))
        process.kill()
        process.wait()
        state = read_state(agent.disk())
        killed["trial" if state.trial else "after" if current(agent.disk()) == state.good else "before"] += 1
        assert runs(agent) in versions
    assert killed["trial"] > 0, killed
    assert killed["after"] > 0, killed
    fleet.release("2.0.0")
    assert agent.once().changed
    assert runs(agent) == "2.0.0"
    assert not list((agent.root / "incoming").iterdir())
    assert len(list((agent.root / "slots").iterdir())) == 2, "what dead runs left is gone"


@pytest.mark.parametrize(("code", "said"), [(UD2, "crashed: SIG"), (ENDLESS, "did not end within")])
def test_an_engine_that_crashes_or_hangs_never_runs(fleet: Fleet, engine: Path, code: bytes, said: str) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    agent.try_engine = functools.partial(try_engine, patience=5.0)
    fleet.release("1.1.0", fleet.bundle("1.1.0", content=with_code(engine, code)))
    with pytest.raises(HealthCheckFailed, match=said):
        agent.once()
    assert runs(agent) == "1.0.0"
    assert agent.once().why == "the device has had it"


def secret(folder: Path) -> Path:
    """Return a file of somebody else's, which an agent of all rights could write."""
    path = folder / "shadow"
    path.write_bytes(b"x" * 700_000)
    return path


def test_a_link_among_what_is_being_fetched_is_not_followed(fleet: Fleet, tmp_path: Path) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    victim = secret(tmp_path)
    before = victim.read_bytes()
    part = agent.root / slots.part_of(digest_bytes(b"1.0.0" * 200_000))
    agent.disk()
    part.symlink_to(victim)
    assert agent.once().changed
    assert victim.read_bytes() == before
    assert runs(agent) == "1.0.0"


def test_a_pipe_among_what_is_being_fetched_does_not_hold_the_agent_up(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.disk()
    os.mkfifo(agent.root / slots.part_of(digest_bytes(b"1.0.0" * 200_000)))
    assert agent.once().changed
    assert runs(agent) == "1.0.0"


@pytest.mark.parametrize("what", ["blob", "slot", "bundle", "file"])
def test_links_among_engines_are_not_followed(fleet: Fleet, tmp_path: Path, what: str) -> None:
    """Content that is right today, but lies where others may change it tomorrow."""
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    disk = agent.disk()
    slot = current(disk)
    name = digest_bytes(b"1.0.0" * 200_000).removeprefix("sha256:")
    path = (
        agent.root
        / {
            "blob": f"blobs/{name}",
            "slot": f"slots/{slot}",
            "bundle": f"slots/{slot}/bundle.cnncc",
            "file": f"slots/{slot}/bundle.cnncc/weights.bin",
        }[what]
    )
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    if what == "blob":
        assert not slots.has_blob(disk, f"sha256:{name}")
    else:
        assert not slots.is_whole(disk, slot)
    fleet.release("1.1.0")
    agent.once()
    fleet.point("1.0.0")
    agent.once()
    assert runs(agent) == "1.0.0"
    shown = (agent.root / "state/current").resolve()
    assert shown.is_relative_to(agent.root)
    assert not any(each.is_symlink() for each in [shown, *shown.rglob("*")])
    assert (tmp_path / "outside").exists(), "what a link leads to is not removed"


@pytest.mark.parametrize("lead", ["/tmp/{slot}", "../../elsewhere/slots/{slot}", "../slots/nothing", ""])
def test_a_current_that_leads_elsewhere_is_led_back(fleet: Fleet, lead: str) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    slot = agent.once().slot
    shown = agent.root / "state/current"
    shown.unlink()
    if lead:
        shown.symlink_to(lead.format(slot=slot))
    else:
        shown.write_bytes(b"no link")
    assert not agent.once().changed
    assert shown.readlink() == Path("../slots") / slot
    assert runs(agent) == "1.0.0"


@pytest.mark.parametrize("slot", ["../../etc", "x", "A" * 64, "../" + "a" * 61])
@pytest.mark.parametrize("where", ["good", "previous"])
def test_a_state_that_names_no_slot_is_damaged(fleet: Fleet, where: str, slot: str) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.try_engine = healthy
    agent.once()
    path = agent.root / "state/state.json"
    state = read_state(agent.disk())
    path.write_text(path.read_text().replace(f'"{where}":"{getattr(state, where)}"', f'"{where}":"{slot}"'))
    with pytest.raises(VerificationFailed, match="is no slot"):
        agent.once()
    assert version_shown(agent) == "1.0.0"


def test_metadata_of_a_channel_that_is_followed_no_more_may_be_damaged(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    (agent.root / "trust/known/canary.json").write_bytes(b"\0" * 100)
    assert agent.once().why == "the device has had it"


def test_a_device_that_wakes_in_1970_takes_news_and_no_stale_word(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    agent.clock = Clock(wall=lambda: 0.0, ran=lambda: 1.0, boot=lambda: "after a power cut")
    fleet.release("1.1.0")
    assert agent.once().changed
    agent.clock = Clock(wall=lambda: 0.0, ran=lambda: 2 * 86400.0, boot=lambda: "after a power cut")
    with pytest.raises(VerificationFailed, match="clock was set back"):
        agent.once()
    assert runs(agent) == "1.1.0"


def test_two_services_on_one_folder_do_no_harm(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    both = [subprocess.Popen([*AGENT, str(agent.root), "once"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes[0] == 0
    assert codes[1] in (2, 10), said  # it came while the other was at work, or afterwards
    assert runs(agent) == "1.0.0"


def test_a_token_that_expires_in_mid_download_is_asked_for_again(tmp_path: Path) -> None:
    data = noise(3 << 20)
    descriptor = of(data)
    with (
        token_server(tmp_path / "tokens", LOGIN) as tokens,
        registries.registry(tmp_path / "registry", tokens=tokens.words) as own,
    ):
        upload(own.repository(login=LOGIN), data, descriptor)
        tokens.asked.clear()
        tokens.lifetime = -57.0  # registries allow for clocks that are a minute off
        with FaultProxy(own.port, None, Fault("cut", 700_000)) as proxy:  # the first connection asks for the login

            def sleep(_: float) -> None:
                time.sleep(4.0)
                tokens.lifetime = 300.0

            repository = own.repository(port=proxy.port, login=LOGIN)
            download(repository, descriptor, tmp_path / "part", pace=Pace(sleep=sleep))
            assert proxy.left == 0
    assert (tmp_path / "part").read_bytes() == data
    assert len(tokens.asked) == 2, "one token to begin with, one to go on with"
