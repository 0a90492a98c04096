"""Manifests and indexes: canonical, and read from whatever bytes come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import VerificationFailed
from cnncc_runtime.oci.formats import (
    EMPTY,
    EMPTY_BYTES,
    INDEX,
    LARGEST_MANIFEST,
    MANIFEST,
    Descriptor,
    Index,
    Manifest,
    Platform,
    describe,
    media_type_of,
    read_index,
    read_manifest,
)

TYPES = st.sampled_from(["application/vnd.cnncc.engine.v1", "text/plain", "application/json"])
NOTES = st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=3)
PLATFORMS = st.builds(Platform, st.sampled_from(["amd64", "arm64"]), st.just("linux"), st.sampled_from(["", "v8"]))
DATA = st.binary(max_size=50)


@st.composite
def descriptors(draw: st.DrawFn) -> Descriptor:
    data = draw(DATA)
    return describe(
        data,
        draw(TYPES),
        artifact_type=draw(st.sampled_from(["", "application/vnd.cnncc.release.v1"])),
        annotations=draw(NOTES),
        platform=draw(st.none() | PLATFORMS),
        inline=draw(st.booleans()),
    )


MANIFESTS = st.builds(
    Manifest, TYPES, descriptors(), st.lists(descriptors(), max_size=3).map(tuple), st.none() | descriptors(), NOTES
)
INDEXES = st.builds(Index, TYPES, st.lists(descriptors(), max_size=3).map(tuple), st.none() | descriptors(), NOTES)


@given(MANIFESTS)
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert read_manifest(data) == manifest
    assert read_manifest(data).to_bytes() == data
    assert media_type_of(data) == MANIFEST


@given(INDEXES)
def test_an_index_is_read_as_it_was_written(index: Index) -> None:
    data = index.to_bytes()
    assert read_index(data) == index
    assert media_type_of(data) == INDEX


@given(MANIFESTS, st.data())
def test_damaged_bytes_are_refused_or_are_a_manifest_by_the_rules(manifest: Manifest, data: st.DataObject) -> None:
    made = bytearray(manifest.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_manifest(bytes(made[: data.draw(st.integers(0, len(made)))]))
    except VerificationFailed:
        return
    for entry in (found.config, *found.layers):
        assert entry.size >= 0
        assert len(entry.digest) == 71


def plain(**changes: object) -> dict[str, object]:
    entry = {"mediaType": EMPTY, "digest": digest_bytes(EMPTY_BYTES), "size": 2}
    made: dict[str, object] = {"schemaVersion": 2, "mediaType": MANIFEST, "config": entry, "layers": [entry]}
    return {**made, **changes}


ENTRY = {"mediaType": EMPTY, "digest": digest_bytes(EMPTY_BYTES), "size": 2}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (plain(schemaVersion=1), "schema 1"),
        (plain(mediaType=INDEX), "it says"),
        (plain(config={**ENTRY, "digest": "sha512:" + "0" * 128}), "no sha256 digest"),
        (plain(config={**ENTRY, "digest": "sha256:" + "0" * 63 + "G"}), "no sha256 digest"),
        (plain(layers=[{**ENTRY, "digest": "sha256:../../etc"}]), "no sha256 digest"),
        (plain(layers=[{**ENTRY, "size": -1}]), "-1 bytes"),
        (plain(layers=[{**ENTRY, "size": 1 << 60}]), "bytes"),
        (plain(layers=[{**ENTRY, "size": 2.5}]), "not a manifest"),
        (plain(layers=[{**ENTRY, "mediaType": "text plain"}]), "no media type"),
        (plain(layers=[{**ENTRY, "data": "eHg="}]), "came along are others"),
        (plain(layers=None), "not a manifest"),
        (plain(annotations={"a": 1}), "not a manifest"),
        ([], "not a manifest"),
    ],
)
def test_what_is_not_by_the_rules_is_refused(value: object, said: str) -> None:
    with pytest.raises(VerificationFailed, match=said):
        read_manifest(json.dumps(value).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"{}" + b" " * LARGEST_MANIFEST])
def test_what_is_no_json_or_endless_is_refused(data: bytes) -> None:
    for read in (read_manifest, read_index, media_type_of):
        with pytest.raises(VerificationFailed):
            read(data)
