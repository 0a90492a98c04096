"""Descriptors, manifests and indexes of the OCI image specification 1.1, read from bytes that may be hostile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import VerificationFailed

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
"""Of a blob ``{}``: the configuration of artifacts that have none."""
EMPTY_BYTES = b"{}"

TITLE = "org.opencontainers.image.title"

LARGEST_MANIFEST = 4 << 20
"""Bytes; registries must take manifests so large (OCI distribution specification 1.1, "Pushing Manifests")."""
_LARGEST_BLOB = 1 << 40

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")


@dataclass(frozen=True)
class Platform:
    """What runs an entry of an index, in the words of the specification."""

    architecture: str
    os: str = "linux"
    variant: str = ""


@dataclass(frozen=True)
class Descriptor:
    """What a blob or manifest is, and its digest.

    Attributes:
        media_type: Of its bytes.
        digest: ``sha256:<hex>``.
        size: Bytes.
        artifact_type: What a manifest is about; empty for blobs.
        annotations: Notes; what a reader needs to choose among entries of an index is among them.
        platform: Of an entry of an index.
        data: The bytes themselves, where they are few and come along; they have the digest.
    """

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    data: bytes | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return it as the specification writes it."""
        plain = _Descriptor(
            self.media_type,
            self.digest,
            self.size,
            self.artifact_type,
            dict(self.annotations),
            _Platform(self.platform.architecture, self.platform.os, self.platform.variant) if self.platform else None,
            self.data,
        )
        made: dict[str, Any] = msgspec.to_builtins(plain)
        return made


@dataclass(frozen=True)
class Manifest:
    """An artifact: a configuration and layers, and what it is about.

    Attributes:
        artifact_type: What it is.
        config: Its configuration; `EMPTY` where it has none.
        layers: Its blobs.
        subject: The manifest that this one refers to.
        annotations: Notes.
    """

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return its canonical bytes: the same manifest has the same digest."""
        plain: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": self.artifact_type,
            "config": self.config.to_plain(),
            "layers": [layer.to_plain() for layer in self.layers],
        }
        return _canonical(plain, self.subject, self.annotations)


@dataclass(frozen=True)
class Index:
    """A list of manifests.

    Attributes:
        artifact_type: What it is.
        manifests: Its entries.
        subject: The manifest that this one refers to.
        annotations: Notes.
    """

    artifact_type: str
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return its canonical bytes: the same index has the same digest."""
        plain: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [entry.to_plain() for entry in self.manifests],
        }
        if self.artifact_type:
            plain["artifactType"] = self.artifact_type
        return _canonical(plain, self.subject, self.annotations)


def describe(
    data: bytes,
    media_type: str,
    *,
    artifact_type: str = "",
    annotations: Mapping[str, str] | None = None,
    platform: Platform | None = None,
    inline: bool = False,
) -> Descriptor:
    """Return the descriptor of bytes.

    Args:
        data: The bytes.
        media_type: See `Descriptor`, as for the others.
        artifact_type: What a manifest is about.
        annotations: Notes.
        platform: Of an entry of an index.
        inline: Whether the bytes come along.
    """
    return Descriptor(
        media_type,
        digest_bytes(data),
        len(data),
        artifact_type,
        dict(annotations or {}),
        platform,
        data if inline else None,
    )


def read_manifest(data: bytes) -> Manifest:
    """Return the manifest that bytes hold.

    Raises:
        VerificationFailed: They hold none, or one that is not by the rules.
    """
    plain = _read(data, _Manifest, MANIFEST)
    return Manifest(
        plain.artifactType or plain.config.mediaType,
        _descriptor(plain.config),
        tuple(_descriptor(layer) for layer in plain.layers),
        _descriptor(plain.subject) if plain.subject else None,
        plain.annotations,
    )


def read_index(data: bytes) -> Index:
    """Return the index that bytes hold.

    Raises:
        VerificationFailed: They hold none, or one that is not by the rules.
    """
    plain = _read(data, _Index, INDEX)
    return Index(
        plain.artifactType,
        tuple(_descriptor(entry) for entry in plain.manifests),
        _descriptor(plain.subject) if plain.subject else None,
        plain.annotations,
    )


def media_type_of(data: bytes) -> str:
    """Return the media type that a manifest or index says it has.

    Raises:
        VerificationFailed: It says none.
    """
    found: str = _decode(data, _Typed).mediaType
    return found


def is_digest(text: str) -> bool:
    """Tell whether a text is a digest that is taken here: sha256 alone."""
    return _DIGEST.fullmatch(text) is not None


class _Platform(msgspec.Struct, omit_defaults=True):
    architecture: str
    os: str
    variant: str = ""


class _Descriptor(msgspec.Struct, omit_defaults=True):
    mediaType: str
    digest: str
    size: int
    artifactType: str = ""
    annotations: dict[str, str] = {}
    platform: _Platform | None = None
    data: bytes | None = None


class _Typed(msgspec.Struct):
    mediaType: str = ""


class _Manifest(msgspec.Struct):
    schemaVersion: int
    config: _Descriptor
    layers: list[_Descriptor]
    mediaType: str = MANIFEST
    artifactType: str = ""
    subject: _Descriptor | None = None
    annotations: dict[str, str] = {}


class _Index(msgspec.Struct):
    schemaVersion: int
    manifests: list[_Descriptor]
    mediaType: str = INDEX
    artifactType: str = ""
    subject: _Descriptor | None = None
    annotations: dict[str, str] = {}


def _canonical(plain: dict[str, Any], subject: Descriptor | None, annotations: Mapping[str, str]) -> bytes:
    if subject is not None:
        plain["subject"] = subject.to_plain()
    if annotations:
        plain["annotations"] = dict(annotations)
    return canonical_json(plain)


def _decode(data: bytes, kind: type[Any]) -> Any:
    if len(data) > LARGEST_MANIFEST:
        raise VerificationFailed(f"a manifest of {len(data)} bytes is larger than registries take")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationFailed(f"not a manifest: {exc}") from exc


def _read(data: bytes, kind: type[Any], media_type: str) -> Any:
    plain = _decode(data, kind)
    if plain.schemaVersion != 2 or plain.mediaType != media_type:
        raise VerificationFailed(
            f"not a manifest of {media_type}: it says {plain.mediaType}, schema {plain.schemaVersion}"
        )
    return plain


def _descriptor(plain: _Descriptor) -> Descriptor:
    made = Descriptor(
        plain.mediaType,
        plain.digest,
        plain.size,
        plain.artifactType,
        plain.annotations,
        Platform(plain.platform.architecture, plain.platform.os, plain.platform.variant) if plain.platform else None,
        plain.data,
    )
    if problem := _problem(made):
        raise VerificationFailed(f"a manifest's entry is not by the rules: {problem}")
    return made


def _problem(entry: Descriptor) -> str:
    if not is_digest(entry.digest):
        return f"{entry.digest[:80]!r} is no sha256 digest"
    if not _MEDIA_TYPE.fullmatch(entry.media_type):
        return f"{entry.media_type[:80]!r} is no media type"
    if not 0 <= entry.size <= _LARGEST_BLOB:
        return f"{entry.size} bytes"
    if entry.data is not None and (len(entry.data) != entry.size or digest_bytes(entry.data) != entry.digest):
        return "the bytes that came along are others"
    return ""
