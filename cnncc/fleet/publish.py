"""Publishing: bundles become a release in a registry; `cnncc.fleet.rollout` says who shall have it.

Blobs first, then the manifests that name them, then the index: a publisher that dies leaves nothing that a device would
take, and one that begins again sends only what is missing. Everything has a tag, since registries collect what has
none, children of an index included (distribution/distribution #3178).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cnncc.fleet.bom import BOM, bill_of_materials
from cnncc.fleet.evidence import examine
from cnncc.fleet.provenance import ENVELOPE, PREDICATE, STATEMENT, Attester, statement, unrecorded
from cnncc_runtime.bundle import Bundle, read_bundle
from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NotInRegistry, ParityFailed, UsageError
from cnncc_runtime.oci.formats import (
    EMPTY,
    EMPTY_BYTES,
    INDEX,
    MANIFEST,
    TITLE,
    Descriptor,
    Manifest,
    describe,
    read_index,
)
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import upload
from cnncc_runtime.releases import (
    CONFIG,
    EVIDENCE,
    FILE,
    VERSION,
    device_files,
    engine_manifest,
    release_entry,
    release_index,
)

UNPROVEN = "dev.cnncc.unproven"
"""Annotation of an engine that was published without a passed parity check: who allowed it, and its verdict."""

PREDICATE_TYPE = "in-toto.io/predicate-type"
"""Annotation of a provenance, by which other tools find it."""

_VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

Progress = Callable[[str, int, int], None]
"""Told of a file, the bytes of it that went since it was last told, and how many it has."""


@dataclass(frozen=True)
class Published:
    """A release in a registry.

    Attributes:
        version: As its publisher calls it.
        digest: Of its index.
        entries: Its engines.
        sent: Bytes that were sent: what was there was not.
        unrecorded: Bundle's folder's name → what it does not say of its build, and so no provenance does.
    """

    version: str
    digest: str
    entries: tuple[Descriptor, ...]
    sent: int
    unrecorded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Engine:
    bundle: Bundle
    manifest: bytes
    entry: Descriptor


def check_bundles(paths: Sequence[Path], *, unproven: Mapping[str, str] | None = None) -> list[Bundle]:
    """Read bundles and see that each may be published: whole to the last byte, proven, none twice.

    Args:
        paths: The bundles.
        unproven: Bundle's folder's name → who allows it to be published without a passed parity check.

    Raises:
        BundleRefused: One is damaged.
        ParityFailed: One's parity was not passed.
        UsageError: None were given, two are for the same device, or they are of several models.
    """
    if not paths:
        raise UsageError("no bundles were given", hint="cnncc publish digits-*.cnncc …")
    bundles = [read_bundle(path) for path in paths]
    doubtful = [
        bundle for bundle in bundles if bundle.manifest.parity != "passed" and bundle.path.name not in (unproven or {})
    ]
    if doubtful:
        raise ParityFailed(
            "nobody proved that these engines compute what the model computes",
            where=[f"{bundle.path}: parity {bundle.manifest.parity}" for bundle in doubtful],
            hint="cnncc verify BUNDLE, on the device or with --emulate; --unproven BUNDLE publishes it and says so",
        )
    for bundle in bundles:
        for name in bundle.manifest.files:
            bundle.file(name)
    if len(names := {bundle.manifest.name for bundle in bundles}) > 1:
        raise UsageError(
            f"a release is of one model, these are of {len(names)}",
            where=sorted(names),
            hint="engines of one `cnncc compile --device A --device B` are of one model",
        )
    seen: dict[tuple[str, ...], Path] = {}
    for bundle in bundles:
        target = bundle.manifest.target
        key = (target.machine, target.gpu, *target.features)
        if key in seen:
            raise UsageError(
                f"two engines for {target.device} would be offered to the same devices",
                where=[str(seen[key]), str(bundle.path)],
                hint="publish one of them",
            )
        seen[key] = bundle.path
    return bundles


def publish(
    bundles: Sequence[Bundle],
    repository: Repository,
    version: str,
    *,
    attester: Attester | None = None,
    unproven: Mapping[str, str] | None = None,
    sessions: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Published:
    """Store a release; no device takes it before a channel's signature points to it.

    A bill of materials and a signed provenance are attached to each engine. Where both are there and believed, they are
    left as they are; after a rotation of the keys, publishing the same again attaches what the new ones sign.

    Args:
        bundles: From `check_bundles`.
        repository: Where.
        version: A name that is not taken by another release.
        attester: Who signs the provenance. None attaches none, nor a bill of materials: `cnncc fleet show` will say so.
        unproven: See `check_bundles`; it is noted in the engine's manifest.
        sessions: A folder that says how far uploads are, for whoever begins again after this process died.
        progress: Told of what is sent.

    Raises:
        UsageError: The version is no tag, or is another release's, or the keys that sign the provenance are not here.
        VerificationFailed: What the registry has of an engine, or lists for it, is not by the rules.
        NetworkFailed: It was not stored; beginning again sends what is missing.
    """
    if not _VERSION.fullmatch(version):
        raise UsageError(f"'{version}' is no version", hint="letters, digits, and . _ - between them, 64 at most")
    engines = [_engine(bundle, unproven or {}) for bundle in bundles]
    index = release_index([engine.entry for engine in engines], version).to_bytes()
    check_free(repository, version, index)
    sent = sum(_store(repository, engine, version, sessions, progress) for engine in engines)
    if attester is not None:
        sent += sum(_attest(repository, engine, version, attester) for engine in engines)
    repository.put_manifest(index, INDEX, tag=version)
    silent = {each.bundle.path.name: unrecorded(each.bundle.manifest) for each in engines}
    return Published(
        version,
        digest_bytes(index),
        read_index(index).manifests,
        sent,
        {name: what for name, what in silent.items() if what},
    )


def _engine(bundle: Bundle, unproven: Mapping[str, str]) -> _Engine:
    allowed = unproven.get(bundle.path.name)
    notes = {UNPROVEN: f"{bundle.manifest.parity}; allowed by {allowed}"} if allowed else {}
    data = engine_manifest(bundle.manifest, notes).to_bytes()
    return _Engine(bundle, data, release_entry(data, bundle.manifest))


def check_free(repository: Repository, version: str, index: bytes) -> None:
    """See that a version is no other release's.

    Raises:
        UsageError: It is.
    """
    try:
        there = repository.manifest(version)
    except NotInRegistry:
        return
    if there != index:
        raise UsageError(
            f"{repository.place} has another release {version} already",
            hint="a version stays what it was when it was published: choose a new one",
        )


def _store(repository: Repository, engine: _Engine, version: str, sessions: Path | None, progress: Progress) -> int:
    """Store an engine and what is beside it; return how many bytes were sent."""
    bundle, own = engine.bundle, engine.bundle.manifest.to_bytes()
    sent = 0

    def put(name: str, source: Path | bytes, blob: Descriptor) -> None:
        def told(went: int) -> None:
            nonlocal sent
            sent += went
            progress(name, went, blob.size)

        upload(repository, source, blob, sessions=sessions, progress=told)

    put("manifest.json", own, describe(own, CONFIG))
    for name, record in bundle.manifest.files.items():
        put(name, bundle.path / name, Descriptor(FILE.format(role=record.role), record.sha256, record.size))
    tag = _tag(engine, version)
    repository.put_manifest(engine.manifest, MANIFEST, tag=tag)
    beside = {
        name: record for name, record in bundle.manifest.files.items() if name not in device_files(bundle.manifest)
    }
    if beside:
        config = describe(EMPTY_BYTES, EMPTY, inline=True)
        put("{}", EMPTY_BYTES, config)
        layers = tuple(
            Descriptor(FILE.format(role=record.role), record.sha256, record.size, annotations={TITLE: name})
            for name, record in sorted(beside.items())
        )
        subject = Descriptor(MANIFEST, engine.entry.digest, engine.entry.size)
        data = Manifest(EVIDENCE, config, layers, subject, {VERSION: version}).to_bytes()
        repository.put_manifest(data, MANIFEST, tag=f"{tag}-evidence")
        repository.refer(data, describe(data, MANIFEST, artifact_type=EVIDENCE), engine.entry.digest)
    return sent


def _attest(repository: Repository, engine: _Engine, version: str, attester: Attester) -> int:
    """Attach an engine's bill of materials and provenance, unless they are there; return how many bytes were sent."""
    digest, own = engine.entry.digest, engine.bundle.manifest
    found = examine(repository, digest, attester)
    provenance, bom = found.document(STATEMENT), found.document(BOM)
    if provenance is not None and bom is not None:
        # an older release's, maybe: tags of this one keep them when that one's go
        for each, suffix in ((bom, "bom"), (provenance, "provenance")):
            repository.put_manifest(repository.manifest(each.digest), MANIFEST, tag=f"{_tag(engine, version)}-{suffix}")
        return 0
    materials = bill_of_materials(own, digest)
    signed = attester.sign(statement(own, digest, materials))
    subject = Descriptor(MANIFEST, digest, engine.entry.size)
    config = describe(EMPTY_BYTES, EMPTY, inline=True)
    sent = len(EMPTY_BYTES) if upload(repository, EMPTY_BYTES, config) else 0
    for suffix, kind, media_type, title, data, notes in (
        ("bom", BOM, BOM, "bom.cdx.json", materials, {}),
        ("provenance", STATEMENT, ENVELOPE, "provenance.intoto.jsonl", signed, {PREDICATE_TYPE: PREDICATE}),
    ):
        layer = describe(data, media_type, annotations={TITLE: title})
        sent += layer.size if upload(repository, data, layer) else 0
        manifest = Manifest(kind, config, (layer,), subject, notes).to_bytes()
        repository.put_manifest(manifest, MANIFEST, tag=f"{_tag(engine, version)}-{suffix}")
        entry = describe(manifest, MANIFEST, artifact_type=kind, annotations=notes)
        repository.refer(manifest, entry, digest)
    return sent


def _tag(engine: _Engine, version: str) -> str:
    return f"{version}-{engine.entry.digest[7:19]}"
