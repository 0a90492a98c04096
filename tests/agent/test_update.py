"""The agent on a device of its own: a real registry, real engines, and everything that goes wrong between them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cnncc_runtime
from cnncc.fleet.keys import Keys
from cnncc.fleet.publish import check_bundles, publish
from cnncc.fleet.rollout import Reach, pause, point
from cnncc.fleet.signing import Signing
from cnncc_runtime.agent.activation import current, read_state
from cnncc_runtime.agent.trial import Verdict
from cnncc_runtime.agent.update import Agent, Enrollment, Outcome, host_hardware
from cnncc_runtime.bundle import EngineRecord, TargetRecord, write_bundle
from cnncc_runtime.cpu import host_machine
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import (
    HealthCheckFailed,
    NetworkFailed,
    NoArtifact,
    UsageError,
    VerificationFailed,
)
from cnncc_runtime.golden import GoldenLimit, golden_bytes
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.transfer import Pace
from cnncc_runtime.releases import Hardware
from tests.oci import registries
from tests.oci.registries import Fault, FaultProxy, Registry
from tests.runtime.engine_files import ENGINE, conv, conv_reference, manifest

X = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype("f")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv(tmp_path_factory.mktemp("engine") / ENGINE)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Registry]:
    """A registry that a test may harm."""
    with registries.registry(tmp_path / "registry") as running:
        yield running


@dataclass
class Fleet:
    """A publisher and its devices.

    Attributes:
        registry: The registry.
        folder: Of both.
        engine: One that is right.
    """

    registry: Registry
    folder: Path
    engine: Path
    name: str = "vision"
    signing: Signing = field(init=False)

    def __post_init__(self) -> None:
        keys = Keys(self.folder / "keys", lambda role: role)
        self.signing = Signing(self.registry.repository(f"{self.name}-tuf"), keys)
        self.root = self.signing.begin()
        self.signing.publish()

    def bundle(self, version: str, *, wrong: bool = False, machine: str = "", content: bytes = b"") -> Path:
        """Write a bundle; ``version`` makes it another one."""
        y = conv_reference(X) + (1 if wrong else 0)
        golden = golden_bytes({"x": X}, {"y": y}, {"y": GoldenLimit(1e-4, 1e-4)})
        made = manifest(toolchain={"version": version})
        if machine:
            target = TargetRecord("llvm", machine, f"{machine}-linux-gnu", "generic", machine, ())
            made = replace(made, target=target, engine=EngineRecord(ENGINE, "tvm-vm", made.engine.abi, {0: "main"}))
        path = self.folder / "bundles" / f"{version}-{machine or 'host'}.cnncc"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        files: dict[str, tuple[str, Path | bytes]] = {
            ENGINE: ("engine", content or self.engine),
            "golden.npz": ("golden", golden),
            "weights.bin": ("weights", version.encode() * 200_000),
        }
        write_bundle(path, made, files)
        return path

    def release(self, version: str, *bundles: Path, channel: str = "stable", **reach: Any) -> None:
        repository = self.registry.repository(self.name)
        publish(check_bundles(bundles or [self.bundle(version)]), repository, version)
        self.point(version, channel=channel, **reach)

    def point(self, version: str, *, channel: str = "stable", paused: bool = False, **reach: Any) -> None:
        repository = self.registry.repository(self.name)
        self.signing.load()
        point(self.signing, repository, channel, self.name, version, Reach(**reach))
        if paused:
            pause(self.signing, repository, channel, self.name, paused=True)
        self.signing.publish()

    def device(self, name: str = "device-1", *, port: int = 0, channel: str = "stable") -> Agent:
        agent = Agent(self.folder / name, connect=lambda host, ca: Connection(host, ca, sleep=lambda _: None))
        agent.pace = Pace(sleep=lambda _: None)
        if not agent.root.exists():
            url = f"http://localhost:{port or self.registry.port}"
            agent.enroll(Enrollment(url, self.name, channel, name), self.root)
        return agent


@pytest.fixture
def fleet(own: Registry, tmp_path: Path, engine: Path) -> Fleet:
    return Fleet(own, tmp_path, engine)


def runs(agent: Agent) -> str:
    """Return the version of the engine that an application would load now; it computes what it should."""
    bundle = agent.root / "state/current/bundle.cnncc"
    with cnncc_runtime.load(bundle) as model:
        np.testing.assert_allclose(model(X), conv_reference(X), rtol=1e-4, atol=1e-4)
    return cnncc_runtime.read_bundle(bundle).manifest.toolchain["version"]


def test_a_device_is_brought_to_what_is_announced(fleet: Fleet) -> None:
    agent = fleet.device()
    assert agent.once() == Outcome(False, "", why="nothing is announced in stable")
    fleet.release("1.0.0")
    told: list[int] = []
    agent.progress = told.append
    outcome = agent.once()
    assert (outcome.changed, outcome.version, outcome.sequence) == (True, "1.0.0", 1)
    assert outcome.latency > 0
    assert sum(told) > 1_000_000
    assert runs(agent) == "1.0.0"
    again = agent.once()
    assert (again.changed, again.why, again.slot) == (False, "the device has had it", outcome.slot)
    told.clear()
    fleet.release("1.1.0")
    assert agent.once().version == "1.1.0"
    assert runs(agent) == "1.1.0"
    assert sum(told) < 1_300_000, "the engine file, which both have, is not fetched again"


def test_a_fleet_goes_back_to_an_older_release_by_a_newer_word(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    fleet.release("1.1.0")
    agent.once()
    fleet.point("1.0.0")
    outcome = agent.once()
    assert (outcome.changed, outcome.version, outcome.sequence) == (True, "1.0.0", 3)
    assert runs(agent) == "1.0.0"


def test_an_engine_that_computes_something_else_never_runs(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    fleet.release("1.1.0", fleet.bundle("1.1.0", wrong=True))
    with pytest.raises(HealthCheckFailed, match="output 'y'") as caught:
        agent.once()
    assert (caught.value.exit_code, caught.value.hint) == (50, "the engine before it runs on")
    assert runs(agent) == "1.0.0"
    assert agent.once().why == "the device has had it", "it is not tried again at every poll"
    fleet.point("1.0.0")
    went_back = agent.once()
    assert (went_back.changed, went_back.why) == (False, "the device runs that engine already")
    fleet.point("1.1.0")
    with pytest.raises(HealthCheckFailed, match="failed on this device before"):
        agent.once()
    fleet.release("1.2.0")
    assert agent.once().changed
    assert runs(agent) == "1.2.0"


def test_a_first_engine_that_fails_leaves_none(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0", fleet.bundle("1.0.0", wrong=True))
    with pytest.raises(HealthCheckFailed) as caught:
        agent.once()
    assert caught.value.hint == "there was none before it"
    assert current(agent.disk()) == ""


def test_an_engine_that_is_much_slower_is_refused(fleet: Fleet) -> None:
    agent = fleet.device()
    latencies = {"1.0.0": 0.010, "1.1.0": 0.018, "1.2.0": 0.100}

    def timed(bundle: Path) -> Verdict:
        return Verdict((), latencies[cnncc_runtime.read_bundle(bundle).manifest.toolchain["version"]], 5)

    agent.try_engine = timed
    for version in ("1.0.0", "1.1.0"):
        fleet.release(version)
        assert agent.once().changed
    fleet.release("1.2.0", slowdown=5.0)
    with pytest.raises(HealthCheckFailed, match="more than 5 times as long"):
        agent.once()
    assert runs(agent) == "1.1.0"


@pytest.mark.parametrize("what", ["engine", "index"])
def test_a_registry_that_was_tampered_with_changes_nothing(fleet: Fleet, what: str) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    bundle = fleet.bundle("1.1.0")
    fleet.release("1.1.0", bundle)
    repository = fleet.registry.repository(fleet.name)
    if what == "engine":
        path = fleet.registry.blob(cnncc_runtime.read_bundle(bundle).manifest.files["weights.bin"].sha256)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        announced = repository.manifest("1.1.0")
        path = fleet.registry.blob(digest_bytes(announced))
        path.write_bytes(repository.manifest("1.0.0"))
    with pytest.raises((VerificationFailed, NetworkFailed)):
        agent.once()
    assert runs(agent) == "1.0.0"
    assert read_state(agent.disk()).bad == (), "the engine is not to blame"


def test_a_release_without_an_engine_for_this_device_changes_nothing(fleet: Fleet) -> None:
    agent = fleet.device()
    other = "aarch64" if host_machine() != "aarch64" else "x86_64"
    fleet.release("1.0.0", fleet.bundle("1.0.0", machine=other))
    with pytest.raises(NoArtifact, match="no engine for this"):
        agent.once()
    fleet.release("1.1.0", fleet.bundle("1.1.0", machine=other), fleet.bundle("1.1.0"))
    assert agent.once().changed
    assert runs(agent) == "1.1.0"


def test_a_release_goes_only_so_far(fleet: Fleet) -> None:
    agents = [fleet.device(f"device-{number}") for number in range(8)]
    fleet.release("1.0.0", percent=40.0)
    first = {agent.root.name for agent in agents if agent.once().changed}
    assert 0 < len(first) < 8
    fleet.point("1.0.0", percent=100.0)
    assert {agent.root.name for agent in agents if agent.once().changed} == {
        agent.root.name for agent in agents
    } - first
    fleet.release("1.1.0", selector="machine=none")
    assert all("it is for devices with machine=none" in agent.once().why for agent in agents[:2])
    fleet.point("1.1.0", paused=True)
    assert agents[0].once().why == "its rollout is paused"


def test_a_network_that_breaks_is_survived_and_nothing_is_fetched_twice(fleet: Fleet) -> None:
    fleet.release("1.0.0")
    faults = [Fault("cut", at) for at in (0, 2000, 300_000, 700_000, 100_000, 50_000)] * 2
    with FaultProxy(fleet.registry.port, *faults) as proxy:
        agent = fleet.device(port=proxy.port)
        assert agent.once().changed
    assert runs(agent) == "1.0.0"


def test_what_a_dead_network_left_is_continued(fleet: Fleet) -> None:
    fleet.release("1.0.0")
    agent = fleet.device()
    left = [3]

    def wanted() -> bool:
        left[0] -= 1
        return left[0] > 0

    agent.pace = Pace(wanted=wanted)
    with pytest.raises(NetworkFailed):
        agent.once()
    parts = [path for path in (agent.root / "incoming").iterdir() if path.stat().st_size]
    have = sum(path.stat().st_size for path in parts)
    have += sum(path.stat().st_size for path in (agent.root / "blobs").iterdir())
    assert have > 0
    told: list[int] = []
    agent.pace, agent.progress = Pace(), told.append
    assert agent.once().changed
    total = sum(path.stat().st_size for path in (agent.root / "state/current/bundle.cnncc").iterdir())
    assert sum(told) == total - have


def test_two_agents_do_not_work_at_once(fleet: Fleet) -> None:
    fleet.release("1.0.0")
    agent = fleet.device()
    said: list[str] = []

    def slow(bundle: Path) -> Verdict:
        with pytest.raises(UsageError, match="another agent is at work") as caught:
            fleet.device().once()
        said.append(caught.value.message)
        return Verdict((), 0.01, 5)

    agent.try_engine = slow
    assert agent.once().changed
    assert len(said) == 1


def test_a_full_disk_leaves_the_engine_that_runs(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    fleet.release("1.1.0")
    agent.hardware = lambda root, profile: replace(host_hardware(root, profile), free=1000)
    with pytest.raises(NoArtifact) as caught:
        agent.once()
    assert any("are free" in why for why in caught.value.where)
    assert runs(agent) == "1.0.0"


def test_what_was_not_enrolled_says_so(tmp_path: Path, fleet: Fleet) -> None:
    with pytest.raises(UsageError, match="is not enrolled") as caught:
        Agent(tmp_path / "new").once()
    assert "cnncc-agent enroll" in caught.value.hint
    agent = fleet.device()
    with pytest.raises(UsageError, match="is enrolled already"):
        agent.enroll(agent.enrollment(), fleet.root)
    (agent.root / "agent.json").write_text("{")
    with pytest.raises(VerificationFailed, match="is damaged"):
        agent.once()


KILLED = """
import sys
from pathlib import Path
from cnncc_runtime.agent.update import Agent
print(Agent(Path(sys.argv[1])).once().version)
"""


@pytest.mark.slow
def test_an_agent_that_is_killed_again_and_again_gets_there(fleet: Fleet) -> None:
    agent = fleet.device()
    fleet.release("1.0.0")
    agent.once()
    random = np.random.default_rng(5)
    for number in range(1, 6):
        version = f"1.{number}.0"
        before = runs(agent)
        fleet.release(version)
        for _ in range(6):
            process = subprocess.Popen([sys.executable, "-c", KILLED, str(agent.root)], stderr=subprocess.DEVNULL)
            time.sleep(float(random.uniform(0.1, 1.5)))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert runs(agent) in (before, version)
        # a trial that was cut short twice counts against the engine: then the fleet's next release is taken
        state = read_state(agent.disk())
        try:
            agent.once()
        except HealthCheckFailed:
            assert read_state(agent.disk()).bad
        assert runs(agent) in (before, version)
        assert read_state(agent.disk()).sequence >= state.sequence
    fleet.release("2.0.0")
    assert agent.once().changed
    assert runs(agent) == "2.0.0"


def test_hardware_is_this_machines(tmp_path: Path) -> None:
    found = host_hardware(tmp_path, "lab")
    assert isinstance(found, Hardware)
    assert (found.machine, found.name) == (host_machine(), "lab")
    assert found.features
    assert found.free is not None
