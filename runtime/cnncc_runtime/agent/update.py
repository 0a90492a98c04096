"""From news to an engine that runs: one poll of the agent.

agent.json   what the device was enrolled with
lock         held by the one agent that works
trust/       metadata (`cnncc_runtime.agent.trust`)
incoming/ blobs/ slots/ state/   engines (`cnncc_runtime.agent.slots`, `cnncc_runtime.agent.activation`)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cnncc_runtime.agent import activation, slots
from cnncc_runtime.agent.clock import Clock
from cnncc_runtime.agent.delta import Deltas, Fetch
from cnncc_runtime.agent.disk import RealDisk
from cnncc_runtime.agent.rollout import Signed, read_signed, why_not
from cnncc_runtime.agent.trial import Verdict, slower, try_engine
from cnncc_runtime.agent.trust import ANCHOR, Trust
from cnncc_runtime.bundle import Manifest as BundleManifest
from cnncc_runtime.cpu import host_cpu, host_machine
from cnncc_runtime.digests import canonical_json
from cnncc_runtime.errors import (
    BundleRefused,
    HealthCheckFailed,
    NoArtifact,
    StorageFailed,
    UsageError,
    VerificationFailed,
)
from cnncc_runtime.files import atomic_file, storage_errors
from cnncc_runtime.gpu import host_gpus
from cnncc_runtime.oci.formats import Descriptor, Index, read_index, read_manifest
from cnncc_runtime.oci.http import Connection
from cnncc_runtime.oci.layout import Layout, Part
from cnncc_runtime.oci.place import place_of
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.source import Source
from cnncc_runtime.oci.transfer import Pace, Progress, download
from cnncc_runtime.releases import Hardware, choose

METADATA = "tuf"
"""What the repository of a fleet's metadata is called, after the name of that of its releases and ``-``."""
_CONFIG = "agent.json"
_TRUST = "trust"
_LARGEST_CONFIG = 16 << 20
_SPARE = 16 << 20
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class Enrollment:
    """What a device was enrolled with.

    Attributes:
        registry: Its address.
        name: Of the model: a repository of the registry.
        channel: Which it follows.
        device: The device's name.
        profile: Of its hardware, where it has one.
        ca: A file of certificates, instead of the system's.
        report: Where outcomes are posted; empty for nowhere.
        report_token: The file of the token that says who the device is there.
    """

    registry: str
    name: str
    channel: str
    device: str
    profile: str = ""
    ca: str = ""
    report: str = ""
    report_token: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a poll did.

    Attributes:
        changed: Whether the device runs another engine now.
        slot: The one that it runs; empty before there is one.
        version: The release that was looked at; empty where none is announced.
        sequence: Its place in the channel.
        why: Why nothing changed, where nothing did.
        latency: Of the engine on its trial, in seconds; 0 without one.
        fetched: Bytes of the engine that came over the network.
        deltas: Files of it that were made by deltas.
        notes: What the user should know of how it came.
    """

    changed: bool
    slot: str
    version: str = ""
    sequence: int = 0
    why: str = ""
    latency: float = 0.0
    fetched: int = 0
    deltas: int = 0
    notes: tuple[str, ...] = ()


@dataclass
class Traffic:
    """How an engine came; see `Outcome`."""

    fetched: int = 0
    deltas: int = 0
    notes: list[str] = field(default_factory=list)


def host_hardware(root: Path, profile: str = "") -> Hardware:
    """Return what this machine is.

    Args:
        root: The agent's folder, on whose disk engines must fit.
        profile: The machine's profile, where it has one.
    """
    free = max(0, shutil.disk_usage(root).free - _SPARE)
    return Hardware(host_machine(), frozenset(host_cpu().features), host_gpus(), profile, free)


@dataclass
class Agent:
    """The agent of a device.

    Attributes:
        root: Its folder.
        hardware: Says what the device is.
        clock: The machine's.
        try_engine: Tries a bundle's engine.
        pace: How fast it downloads, and when.
        connect: Makes a connection to a registry.
        progress: Told of bytes.
        note: Told what the user should know of how an engine comes, as it happens.
        release: What is signed with the release that was looked at last.
        traffic: How the engine came that was looked at last.
    """

    root: Path
    hardware: Callable[[Path, str], Hardware] = host_hardware
    clock: Clock = field(default_factory=Clock)
    try_engine: Callable[[Path], Verdict] = try_engine
    pace: Pace = field(default_factory=Pace)
    connect: Callable[[str, Path | None], Connection] = Connection
    progress: Progress = lambda _: None
    note: Callable[[str], None] = lambda _: None
    release: Signed | None = field(default=None, init=False)
    traffic: Traffic = field(default_factory=Traffic, init=False)

    def enroll(self, enrollment: Enrollment, root: bytes) -> None:
        """Make this device one of a fleet's.

        Args:
            enrollment: Which fleet, and who the device is.
            root: The fleet's root metadata, from somebody who is trusted: all trust begins there.

        Raises:
            UsageError: The device is enrolled already, or the registry's address is none.
            StorageFailed: The folder cannot be written.
        """
        place_of(enrollment.registry, enrollment.name)
        if (self.root / _CONFIG).exists():
            raise UsageError(f"{self.root} is enrolled already", hint="remove that folder to begin anew")
        self.disk()
        with storage_errors(self.root):
            (self.root / _TRUST).mkdir(exist_ok=True)
        with atomic_file(self.root / _TRUST / ANCHOR) as path:
            path.write_bytes(root)
        with atomic_file(self.root / _CONFIG) as path:
            path.write_bytes(canonical_json(msgspec.to_builtins(enrollment)))

    def enrollment(self) -> Enrollment:
        """Return what the device was enrolled with.

        Raises:
            UsageError: It was not.
            VerificationFailed: The file is damaged.
        """
        path = self.root / _CONFIG
        try:
            with storage_errors(path):
                return msgspec.json.decode(path.read_bytes(), type=Enrollment)
        except StorageFailed as exc:
            raise UsageError(f"{self.root} is not enrolled", hint="cnncc-agent enroll --root root.json …") from exc
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise VerificationFailed(f"{path} is damaged: {exc}", hint="enroll the device again") from exc

    def disk(self) -> RealDisk:
        """Return the agent's folder, with the folders that it has."""
        disk = RealDisk(self.root)
        for name in slots.FOLDERS:
            disk.folder(name)
        return disk

    def once(self) -> Outcome:
        """Ask for news, and bring the device to what is announced for it.

        Raises:
            UsageError: The device is not enrolled, or another agent is at work.
            NetworkFailed: No answer; what was fetched so far is kept.
            VerificationFailed: What came is not to be believed, and was not taken.
            NoArtifact: The release has nothing for this device.
            HealthCheckFailed: The new engine failed; the one before runs.
            StorageFailed: The disk is full or broken; the engine runs on.
        """
        enrollment = self.enrollment()
        repository, metadata = self._repositories(enrollment)
        self.traffic = Traffic()

        def told(came: int) -> None:
            self.traffic.fetched += came
            self.progress(came)

        def fetch(blob: Descriptor, part: Path) -> None:
            download(repository, blob, part, pace=self.pace, progress=told)

        return self._bring(enrollment, repository, metadata, fetch, repository)

    def install(self, archive: Path) -> Outcome:
        """Bring the device to the release in an archive, where there is no network; believed and tried as any other.

        Args:
            archive: From ``cnncc fleet export``.

        Raises:
            As `once`.
        """
        enrollment = self.enrollment()
        self.traffic = Traffic()
        with Layout.open(archive) as layout:
            return self._bring(enrollment, Part(layout), Part(layout, f"{METADATA}/"), layout.copy)

    def back(self) -> str:
        """Go back to the engine before the present one, which is refused from now on; return its slot.

        Raises:
            UsageError: There is none, or another agent is at work.
            StorageFailed: The disk is full or broken.
        """
        self.enrollment()
        with self._locked():
            disk = self.disk()
            if not activation.back(disk):
                raise UsageError("there is no engine to go back to", hint="publish an older release again instead")
            return activation.current(disk)

    def collect(self) -> list[str]:
        """Remove engines and blobs that nothing needs; return what was removed.

        Raises:
            UsageError: Another agent is at work.
            StorageFailed: The disk is broken.
        """
        self.enrollment()
        with self._locked():
            disk = self.disk()
            return slots.collect(disk, activation.read_state(disk).needed)

    def _bring(
        self,
        enrollment: Enrollment,
        releases: Source,
        metadata: Source,
        fetch: Fetch,
        deltas: Repository | None = None,
    ) -> Outcome:
        with self._locked():
            disk = self.disk()
            state = activation.settle(disk, lambda slot: not self._trial(slot, None).problems)
            announced = Trust(self.root / _TRUST, metadata, self.clock).announced(
                f"{enrollment.channel}/{enrollment.name.rpartition('/')[2]}"
            )
            if announced is None:
                return Outcome(False, state.good, why=f"nothing is announced in {enrollment.channel}")
            self.release = signed = read_signed(announced.custom)
            if signed.sequence <= state.sequence:
                return Outcome(False, state.good, signed.version, signed.sequence, "the device has had it")
            hardware = self.hardware(self.root, enrollment.profile)
            if why := why_not(signed, enrollment.device, hardware, state.sequence):
                return Outcome(False, state.good, signed.version, signed.sequence, why)
            manifest, slot = self._choose(releases, read_index(releases.manifest(announced.digest)), hardware)
            made_of = Deltas(deltas, disk, state.good, fetch, self._note) if deltas is not None else None
            return self._update(disk, manifest, slot, signed, fetch, made_of)

    def _update(
        self, disk: RealDisk, manifest: bytes, slot: str, signed: Signed, fetch: Fetch, deltas: Deltas | None
    ) -> Outcome:
        before = activation.read_state(disk)
        if slot in before.bad:
            raise HealthCheckFailed(
                f"the engine of release {signed.version} failed on this device before", where=[f"slots/{slot}"]
            )
        lacking = {
            layer.digest: layer for layer in read_manifest(manifest).layers if not slots.has_blob(disk, layer.digest)
        }
        if deltas is not None:
            deltas.look(slot, tuple(lacking.values()))
        for digest, layer in lacking.items():
            if deltas is not None and deltas.make(layer):
                self.traffic.deltas += 1
            else:
                fetch(layer, self.root / slots.part_of(digest))
            slots.admit(disk, digest)
        slots.stage(disk, manifest, slot)
        verdicts: list[Verdict] = []

        def healthy(tried: str) -> bool:
            verdicts.append(self._trial(tried, before.good or None, signed.slowdown))
            return not verdicts[-1].problems

        activation.begin(disk, slot, signed.sequence)
        state = activation.settle(disk, healthy)
        slots.collect(disk, state.needed)
        problems = verdicts[-1].problems if verdicts else ("its files were damaged on this device's disk",)
        if state.good != slot or problems:
            raise HealthCheckFailed(
                f"release {signed.version} failed on this device: {'; '.join(problems)}",
                where=[f"slots/{slot}"],
                hint="the engine before it runs on" if state.good else "there was none before it",
            )
        changed = state.good != before.good
        return Outcome(
            changed, slot, signed.version, signed.sequence, "" if changed else "the device runs that engine already",
            verdicts[-1].latency, self.traffic.fetched, self.traffic.deltas, tuple(self.traffic.notes),
        )  # fmt: skip

    def _note(self, text: str) -> None:
        self.traffic.notes.append(text)
        self.note(text)

    def _choose(self, source: Source, index: Index, hardware: Hardware) -> tuple[bytes, str]:
        """Return the manifest of the most specific engine that opens here, and its slot's name."""
        from cnncc_runtime.session import obstacle

        obstacles = []
        for offer in choose(index, hardware):
            manifest = source.manifest(offer.entry.digest)
            config = source.small_blob(read_manifest(manifest).config, most=_LARGEST_CONFIG)
            try:
                bundle = BundleManifest.from_bytes(config)
            except BundleRefused as exc:
                obstacles.append(f"{offer.device}: {exc.message}")
                continue
            away = obstacle(bundle.target, bundle.engine)
            if away is None:
                return manifest, slots.hex_of(offer.entry.digest)
            obstacles.append(f"{offer.device}: {away.message}")
        raise NoArtifact(
            "the release has no engine that opens on this device",
            where=obstacles,
            hint="install what is missing, or publish a release that this device opens",
        )

    def _trial(self, slot: str, before: str | None, slowdown: int = 200) -> Verdict:
        """Try a slot's engine, beside the one before where there is one."""
        verdict = self.try_engine(self.root / "slots" / slot / slots.BUNDLE)
        if verdict.problems or before is None or before == slot:
            return verdict
        old = self.try_engine(self.root / "slots" / before / slots.BUNDLE)
        why = slower(verdict, old, slowdown / 100)
        return Verdict((why,), verdict.latency, verdict.runs) if why else verdict

    def _repositories(self, enrollment: Enrollment) -> tuple[Repository, Repository]:
        place = place_of(enrollment.registry, enrollment.name)
        connection = self.connect(place.host, Path(enrollment.ca) if enrollment.ca else None)
        return Repository(place, connection), Repository(place.beside(METADATA), connection)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.root / "lock"
        with storage_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise UsageError(f"another agent is at work in {self.root}", hint="it will be done soon") from exc
            yield
        finally:
            os.close(handle)
