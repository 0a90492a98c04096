"""Releases: an OCI index of engines, and which of them a device takes.

    index     application/vnd.cnncc.release.v1   an entry for each engine: platform, and what it needs, as annotations
    manifest  application/vnd.cnncc.engine.v1    config: the bundle's manifest; layers: the files that a device needs

What else is in a bundle (the model, reports) lies beside, in an artifact that refers to the engine's. Everything is
named by its digest, so that the index's digest, which is what a fleet's publisher signs, covers every byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cnncc_runtime.bundle import MANIFEST as BUNDLE_MANIFEST
from cnncc_runtime.bundle import FileRecord
from cnncc_runtime.bundle import Manifest as BundleManifest
from cnncc_runtime.errors import NoArtifact, UsageError, VerificationFailed
from cnncc_runtime.gpu import NEWER, HostGpu
from cnncc_runtime.oci.formats import MANIFEST, TITLE, Descriptor, Index, Manifest, Platform, describe

RELEASE = "application/vnd.cnncc.release.v1"
ENGINE = "application/vnd.cnncc.engine.v1"
EVIDENCE = "application/vnd.cnncc.evidence.v1"
CONFIG = "application/vnd.cnncc.bundle.v1+json"
FILE = "application/vnd.cnncc.bundle.{role}.v1"

NEEDED = ("engine", "weights", "golden")
"""Roles of the files that a device needs, beside the bundle's manifest."""

VERSION = "org.opencontainers.image.version"
_PREFIX = "dev.cnncc."
DEVICE, CPU, FEATURES, GPU, FORMAT, ABI, BYTES, PRECISION = (
    _PREFIX + name for name in ("device", "cpu", "cpu.features", "cuda.sm", "format", "abi", "bytes", "precision")
)

ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "arm": ("arm", "v7"),
    "riscv64": ("riscv64", ""),
}
"""ELF machine → architecture and variant, as Go and so OCI call them."""


@dataclass(frozen=True)
class Hardware:
    """What a device is.

    Attributes:
        machine: ELF machine name.
        features: ISA features that its CPU has.
        gpus: Its GPUs.
        name: Its profile's name, where it knows one.
        free: Bytes on its disk that an engine may take.
    """

    machine: str
    features: frozenset[str]
    gpus: tuple[HostGpu, ...] = ()
    name: str = ""
    free: int | None = None


@dataclass(frozen=True)
class Offer:
    """An entry of a release.

    Attributes:
        entry: Its descriptor.
        machine: ELF machine that it is for; empty for one that is unknown here.
        features: ISA features that it needs.
        gpu: CUDA compute capability that it needs; empty for none.
        device: The profile that it was built for.
        bytes: What it takes on the disk.
    """

    entry: Descriptor
    machine: str
    features: frozenset[str]
    gpu: str = ""
    device: str = ""
    bytes: int = 0

    def obstacle(self, hardware: Hardware) -> str:
        """Return why a device cannot run it, or an empty text."""
        if self.machine != hardware.machine:
            return f"it is for {self.machine or self.entry.platform}, this is {hardware.machine}"
        if lacking := sorted(self.features - hardware.features):
            return f"the CPU lacks {' '.join(lacking)}"
        if self.gpu and not any(gpu.runs(self.gpu) for gpu in hardware.gpus):
            return f"it needs a GPU of compute capability {self.gpu}"
        if hardware.free is not None and self.bytes > hardware.free:
            return f"it takes {self.bytes >> 20} MiB, {hardware.free >> 20} MiB are free"
        return ""

    def rank(self, hardware: Hardware) -> tuple[bool, bool, bool, int]:
        """Return how specific to a device it is: the most specific sorts last."""
        exact = bool(self.gpu) and not self.gpu.endswith(NEWER)
        return bool(self.gpu), exact, bool(hardware.name) and self.device == hardware.name, len(self.features)


def device_files(bundle: BundleManifest) -> dict[str, FileRecord]:
    """Return the files of a bundle that a device needs, beside its manifest: name → record."""
    return {name: record for name, record in bundle.files.items() if record.role in NEEDED}


def engine_manifest(bundle: BundleManifest, annotations: Mapping[str, str] | None = None) -> Manifest:
    """Return the manifest in a registry of a bundle's engine.

    Args:
        bundle: The bundle's own manifest.
        annotations: Notes.

    Raises:
        UsageError: A file of it is in a folder of its own.
    """
    own = bundle.to_bytes()
    config = describe(own, CONFIG)
    layers = [describe(own, FILE.format(role="manifest"), annotations={TITLE: BUNDLE_MANIFEST})]
    for name, record in sorted(device_files(bundle).items()):
        if "/" in name:
            raise UsageError(f"the bundle's file '{name}' is in a folder, where devices look for none")
        layers.append(Descriptor(FILE.format(role=record.role), record.sha256, record.size, annotations={TITLE: name}))
    return Manifest(ENGINE, config, tuple(layers), annotations=dict(annotations or {}))


def release_entry(manifest: bytes, bundle: BundleManifest) -> Descriptor:
    """Return the entry of a release's index for an engine.

    Args:
        manifest: The engine's manifest in the registry, byte for byte.
        bundle: The bundle's own.

    Raises:
        UsageError: It is for a machine that registries have no name for.
    """
    target, engine = bundle.target, bundle.engine
    known = ARCHITECTURES.get(target.machine)
    if known is None:
        raise UsageError(f"engines for {target.machine} cannot be released: registries have no name for it")
    notes = {
        DEVICE: target.device,
        CPU: target.cpu,
        FEATURES: " ".join(target.features),
        GPU: target.gpu,
        FORMAT: engine.format,
        ABI: engine.abi,
        PRECISION: bundle.precision,
        BYTES: str(sum(record.size for record in device_files(bundle).values())),
    }
    return describe(
        manifest,
        MANIFEST,  # without an artifact type: tools older than version 1.1 of the specification would drop it from here
        annotations={name: value for name, value in notes.items() if value},
        platform=Platform(known[0], variant=known[1]),
    )


def release_index(entries: Iterable[Descriptor], version: str) -> Index:
    """Return a release's index; the order of its entries does not depend on who made it."""
    ordered = sorted(entries, key=lambda entry: entry.digest)
    return Index(RELEASE, tuple(ordered), annotations={VERSION: version})


def offers_of(index: Index) -> tuple[Offer, ...]:
    """Return what a release offers.

    Raises:
        VerificationFailed: It is no release.
    """
    if index.artifact_type != RELEASE:
        raise VerificationFailed(f"what was signed is no release: {index.artifact_type[:80]!r}")
    return tuple(_offer(entry) for entry in index.manifests)


def choose(index: Index, hardware: Hardware) -> tuple[Offer, ...]:
    """Return what of a release a device can run, the most specific first.

    Raises:
        NoArtifact: Nothing; it says why not, entry by entry.
        VerificationFailed: It is no release.
    """
    offers = offers_of(index)
    fitting = [offer for offer in offers if not offer.obstacle(hardware)]
    if not fitting:
        raise NoArtifact(
            f"the release has no engine for this {hardware.machine}",
            where=[f"{offer.device or offer.entry.digest[:19]}: {offer.obstacle(hardware)}" for offer in offers],
            hint="compile for this device, and publish a release that has it too",
        )
    return tuple(sorted(fitting, key=lambda offer: (offer.rank(hardware), offer.entry.digest), reverse=True))


_MACHINES = {architecture: machine for machine, (architecture, _) in ARCHITECTURES.items()}


def _offer(entry: Descriptor) -> Offer:
    notes = entry.annotations
    size = notes.get(BYTES, "0")
    if entry.platform is None or not (size.isdecimal() and len(size) < 16):
        raise VerificationFailed(f"the release's entry {entry.digest} does not say what it is for")
    return Offer(
        entry,
        _MACHINES.get(entry.platform.architecture, "") if entry.platform.os == "linux" else "",
        frozenset(notes.get(FEATURES, "").split()),
        notes.get(GPU, ""),
        notes.get(DEVICE, ""),
        int(size),
    )
