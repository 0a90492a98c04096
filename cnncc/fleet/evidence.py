"""What is attached to a release's engines in a registry, and what of it may be believed.

A registry lists what refers to a manifest (OCI referrers); whoever may write to it can add to that list and take away.
So a provenance is believed by its signature, everything else by the digest that a believed provenance names, and what
ought to be there and is not is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnncc.fleet.bom import BOM
from cnncc.fleet.provenance import STATEMENT, Attester, Provenance
from cnncc.fleet.rollout import Pointer
from cnncc_runtime.bundle import Manifest as BundleManifest
from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import NotInRegistry, VerificationFailed
from cnncc_runtime.files import atomic_folder
from cnncc_runtime.oci.formats import TITLE, Descriptor, Manifest, read_index, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.releases import EVIDENCE, device_files, offers_of

SUMMARY = "release.json"
"""What `write_documents` says of a release, beside the documents."""

_LARGEST = 16 << 20


@dataclass(frozen=True)
class Attached:
    """An artifact that a registry lists as referring to an engine.

    Attributes:
        artifact_type: What it says that it is.
        digest: Of its manifest.
        size: Bytes that it holds; 0 where it could not be read.
        names: Of its files.
        believed: Whether something signed covers it; None where nothing that is signed speaks of such artifacts.
        said: Why it is not believed, or by whom it is.
        document: Its bytes, where it is a document that is believed.
    """

    artifact_type: str
    digest: str
    size: int
    names: tuple[str, ...]
    believed: bool | None
    said: str
    document: bytes | None = None


@dataclass(frozen=True)
class Examined:
    """An engine, and what is attached to it.

    Attributes:
        digest: Of its manifest.
        manifest: That.
        provenance: The first that is believed.
        attached: All that the registry lists.
        problems: What is not as it ought to be; nothing where all may be believed.
    """

    digest: str
    manifest: Manifest
    provenance: Provenance | None
    attached: tuple[Attached, ...]
    problems: tuple[str, ...]

    def document(self, artifact_type: str) -> Attached | None:
        """Return the first artifact of a type that is believed and whose bytes are known."""
        for each in self.attached:
            if each.artifact_type == artifact_type and each.believed and each.document is not None:
                return each
        return None


@dataclass(frozen=True)
class EngineEvidence:
    """An engine of a release whose provenance is believed.

    Attributes:
        examined: What is attached to it.
        bundle: The bundle's manifest, which the provenance covers.
    """

    examined: Examined
    bundle: BundleManifest

    @property
    def bytes(self) -> int:
        """What a device takes of it."""
        return sum(record.size for record in device_files(self.bundle).values())

    @property
    def label(self) -> str:
        """Plain text that no other engine of the release has, for names of files."""
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.bundle.target.device)}-{self.examined.digest[7:19]}"


@dataclass(frozen=True)
class ReleaseEvidence:
    """A release of which everything attached may be believed.

    Attributes:
        version: Its tag.
        digest: Of its index.
        channels: Those that point to it by a signature.
        engines: Its engines.
    """

    version: str
    digest: str
    channels: tuple[str, ...]
    engines: tuple[EngineEvidence, ...]


def examine(repository: Repository, digest: str, attester: Attester) -> Examined:
    """Return what is attached to an engine, and what of it is believed.

    Args:
        repository: Where.
        digest: Of the engine's manifest.
        attester: Whose signatures count.

    Raises:
        NotInRegistry: There is no such engine.
        VerificationFailed: The registry gives other bytes for it, or its list of what refers to it is none.
        NetworkFailed: No answer.
    """
    engine = read_manifest(repository.manifest(digest))
    found = [_fetch(repository, entry, digest) for entry in repository.referrers(digest)]
    # provenance first: it is what the others are believed by
    read = [_provenance(repository, each, engine, digest, attester) for each in found if each.kind == STATEMENT]
    believed = [provenance for _, provenance in read if provenance is not None]
    attached = [each for each, _ in read]
    attached += [_covered(repository, each, believed) for each in found if each.kind != STATEMENT]
    problems = [*_lacking(attached), *_not_there(digest, engine, attached, believed)]
    return Examined(digest, engine, believed[0] if believed else None, tuple(attached), tuple(problems))


def release_evidence(
    repository: Repository, version: str, attester: Attester, pointers: Sequence[Pointer]
) -> ReleaseEvidence:
    """Return what is attached to a release's engines, all of it believed.

    Args:
        repository: Where.
        version: The release's.
        attester: Whose signatures count.
        pointers: Where the fleet's channels point.

    Raises:
        NotInRegistry: There is no such release.
        VerificationFailed: An engine's provenance or bill of materials is missing or not to be believed, or the version
            is not the release that a channel's key signed.
        NetworkFailed: No answer.
    """
    data = repository.manifest(version)
    digest = digest_bytes(data)
    others = [each.channel for each in pointers if each.signed.version == version and each.digest != digest]
    if others:
        raise VerificationFailed(
            f"{version} is another release than the one that {' and '.join(others)} points to by signature",
            where=[f"{repository.place}:{version}"],
            hint="somebody moved the tag: was the registry tampered with?",
        )
    offers = offers_of(read_index(data))
    examined = [examine(repository, offer.entry.digest, attester) for offer in offers]
    problems = [
        f"{offer.device or 'engine'} {each.digest[:19]}…: {problem}"
        for offer, each in zip(offers, examined, strict=True)
        for problem in each.problems
    ]
    if problems:
        raise VerificationFailed(
            f"what is attached to {version} cannot be believed",
            where=problems,
            hint="`cnncc publish` of the same bundles and version attaches what is missing; after a rotation of "
            "provenance's keys that is how it is signed anew",
        )
    channels = tuple(each.channel for each in pointers if each.digest == digest)
    return ReleaseEvidence(version, digest, channels, tuple(_engine(repository, each) for each in examined))


def write_documents(found: ReleaseEvidence, folder: Path, summary: Mapping[str, object]) -> list[str]:
    """Write bills of materials and provenances into a folder, whole or not at all; return the files' names.

    Args:
        found: The release.
        folder: It may be one that this function wrote, and nothing else.
        summary: Goes into `SUMMARY`.

    Raises:
        StorageFailed: The folder cannot be written, or is of other things.
    """
    files = {SUMMARY: canonical_json(summary)}
    for engine in found.engines:
        for kind, suffix in ((BOM, "cdx.json"), (STATEMENT, "intoto.jsonl")):
            attached = engine.examined.document(kind)
            assert attached is not None
            assert attached.document is not None
            files[f"{engine.label}.{suffix}"] = attached.document
    with atomic_folder(folder, marker=SUMMARY) as path:
        for name, data in files.items():
            (path / name).write_bytes(data)
    return sorted(files)


@dataclass(frozen=True)
class _Fetched:
    """What the registry lists, and the manifest that it gives for it; ``problem`` where that is of no use."""

    kind: str
    digest: str
    layers: tuple[Descriptor, ...] = ()
    problem: str = ""

    def said(self, *, believed: bool | None, said: str, document: bytes | None = None) -> Attached:
        names = tuple(layer.annotations.get(TITLE, "") for layer in self.layers)
        size = sum(layer.size for layer in self.layers)
        return Attached(self.kind, self.digest, size, names, believed, said, document)


def _fetch(repository: Repository, entry: Descriptor, subject: str) -> _Fetched:
    try:
        manifest = read_manifest(repository.manifest(entry.digest))
    except (NotInRegistry, VerificationFailed) as exc:
        return _Fetched(entry.artifact_type, entry.digest, problem=exc.message)
    problem = ""
    if manifest.subject is None or manifest.subject.digest != subject:
        about = f"{manifest.subject.digest[:19]}…" if manifest.subject else "nothing"
        problem = f"it refers to {about}, which is not this engine"
    # the manifest's own type: tools older than OCI 1.1 drop it from lists that they copy
    return _Fetched(manifest.artifact_type, entry.digest, manifest.layers, problem)


def _document(repository: Repository, fetched: _Fetched) -> bytes:
    """Return the one blob of an artifact.

    Raises:
        VerificationFailed: It has another number, is too large, or not there.
    """
    if fetched.problem:
        raise VerificationFailed(fetched.problem)
    if len(fetched.layers) != 1:
        raise VerificationFailed(f"it holds {len(fetched.layers)} documents")
    [layer] = fetched.layers
    try:
        return repository.small_blob(layer, most=_LARGEST)
    except NotInRegistry as exc:
        raise VerificationFailed(exc.message) from exc


def _provenance(
    repository: Repository, fetched: _Fetched, engine: Manifest, digest: str, attester: Attester
) -> tuple[Attached, Provenance | None]:
    try:
        data = _document(repository, fetched)
        found = attester.read(data)
        if problem := _is_of_another(found, engine, digest):
            raise VerificationFailed(problem)
    except VerificationFailed as exc:
        return fetched.said(believed=False, said=exc.message), None
    keys = ", ".join(f"{keyid[:16]}…" for keyid in found.keyids)
    return fetched.said(believed=True, said=f"signed by {keys}", document=data), found


def _is_of_another(found: Provenance, engine: Manifest, digest: str) -> str:
    if digest not in found.subjects.values():
        about = next(iter(found.subjects), "nothing")
        return f"it is of another engine: of {about}"
    named = {layer.annotations.get(TITLE, ""): layer.digest for layer in engine.layers}
    wrong = sorted(name for name, its in found.subjects.items() if named.get(name, its) != its)
    return f"it names other files than the engine has: {', '.join(wrong)}" if wrong else ""


def _covered(repository: Repository, fetched: _Fetched, believed: Sequence[Provenance]) -> Attached:
    """Return what is not a provenance, held against those that are believed."""
    if fetched.kind not in (BOM, EVIDENCE):
        return fetched.said(believed=None, said=fetched.problem or "nothing that is signed speaks of it")
    if fetched.problem:
        return fetched.said(believed=False, said=fetched.problem)
    if not believed:
        return fetched.said(believed=False, said="no provenance that is believed names it")
    if fetched.kind == EVIDENCE:
        good = any(_all_named(fetched.layers, provenance.subjects) for provenance in believed)
        return fetched.said(believed=good, said="" if good else "its files are not those that the provenance names")
    try:
        data = _document(repository, fetched)
    except VerificationFailed as exc:
        return fetched.said(believed=False, said=exc.message)
    if not any(digest_bytes(data) in provenance.byproducts.values() for provenance in believed):
        return fetched.said(believed=False, said="it is not the one that the provenance names")
    return fetched.said(believed=True, said="", document=data)


def _all_named(layers: Iterable[Descriptor], named: Mapping[str, str]) -> bool:
    return all(named.get(layer.annotations.get(TITLE, "")) == layer.digest for layer in layers)


def _lacking(attached: Sequence[Attached]) -> list[str]:
    """Return which documents every engine should have and this one has not, and why not."""
    problems = []
    for kind, name in ((STATEMENT, "provenance"), (BOM, "bill of materials")):
        those = [each for each in attached if each.artifact_type == kind]
        if not those:
            problems.append(f"it has no {name}: it was taken away, or never attached")
        elif not any(each.believed for each in those):
            problems += [f"its {name} {each.digest[:19]}… is not believed: {each.said}" for each in those]
    return problems


def _not_there(
    digest: str, engine: Manifest, attached: Sequence[Attached], believed: Sequence[Provenance]
) -> list[str]:
    """Return that files are missing which the provenance names: neither the engine nor its evidence holds them."""
    there = {layer.annotations.get(TITLE, "") for layer in engine.layers}
    for each in attached:
        if each.artifact_type == EVIDENCE and each.believed:
            there.update(each.names)
    subjects = believed[0].subjects if believed else {}
    lacking = [name for name, its in subjects.items() if its != digest and name not in there]
    if not lacking:
        return []
    return [f"its provenance names {', '.join(lacking)}: taken away, or others were put in their place"]


def _engine(repository: Repository, examined: Examined) -> EngineEvidence:
    data = repository.small_blob(examined.manifest.config, most=_LARGEST)
    return EngineEvidence(examined, BundleManifest.from_bytes(data))
