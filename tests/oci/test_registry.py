"""Manifests, tags and referrers in a real registry; logins, certificates and what is broken on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cnncc_runtime.digests import digest_bytes
from cnncc_runtime.errors import NetworkFailed, NotInRegistry, RegistryRefused, UsageError, VerificationFailed
from cnncc_runtime.oci.credentials import Credentials
from cnncc_runtime.oci.formats import (
    EMPTY,
    EMPTY_BYTES,
    INDEX,
    MANIFEST,
    Descriptor,
    Index,
    Manifest,
    describe,
    read_manifest,
)
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.oci.transfer import upload
from tests.oci import registries
from tests.oci.registries import LOGIN, Fault, FaultProxy, Registry

NOTE = "application/vnd.cnncc.note.v1"
CONFIG = describe(EMPTY_BYTES, EMPTY, inline=True)


def put(repository: Repository, text: str, *, tag: str = "", subject: Descriptor | None = None) -> Descriptor:
    """Store a note, a manifest with one layer; return its descriptor."""
    layer = describe(text.encode(), "text/plain")
    upload(repository, EMPTY_BYTES, CONFIG)
    upload(repository, text.encode(), layer)
    data = Manifest(NOTE, CONFIG, (layer,), subject).to_bytes()
    entry = describe(data, MANIFEST, artifact_type=NOTE)
    if subject is None:
        repository.put_manifest(data, MANIFEST, tag=tag)
    else:
        repository.refer(data, entry, subject.digest)
    return entry


def test_what_was_stored_is_found_by_tag_and_by_digest(registry: Registry) -> None:
    repository = registry.repository("stored")
    assert repository.tags() == set()
    entry = put(repository, "hello", tag="v1")
    assert repository.tags() == {"v1"}
    for reference in ("v1", entry.digest):
        assert repository.has(reference)
        data = repository.manifest(reference)
        assert digest_bytes(data) == entry.digest
        assert read_manifest(data).artifact_type == NOTE
    assert repository.has_blob(digest_bytes(b"hello"))
    assert not repository.has_blob(digest_bytes(b"goodbye"))
    assert not repository.has("v2")
    with pytest.raises(NotInRegistry, match="MANIFEST_UNKNOWN"):
        repository.manifest("v2")


def test_all_tags_are_listed(registry: Registry) -> None:
    repository = registry.repository("many")
    entry = put(repository, "one of many", tag="t0")
    data = repository.manifest(entry.digest)
    for number in range(1, 5):
        repository.put_manifest(data, MANIFEST, tag=f"t{number}")
    assert repository.tags() == {f"t{number}" for number in range(5)}


def test_referrers_are_listed_without_the_registrys_help(registry: Registry) -> None:
    repository = registry.repository("referred")
    subject = put(repository, "subject", tag="v1")
    assert repository.referrers(subject.digest) == ()
    first = put(repository, "first", subject=subject)
    second = put(repository, "second", subject=subject)
    put(repository, "first", subject=subject)  # again: it is listed once
    assert {entry.digest for entry in repository.referrers(subject.digest)} == {first.digest, second.digest}
    assert repository.referrers(subject.digest, "application/other") == ()
    assert len(repository.referrers(subject.digest, NOTE)) == 2


def test_a_registry_takes_no_index_whose_entries_it_lacks(registry: Registry) -> None:
    repository = registry.repository("incomplete")
    missing = describe(b"nowhere", MANIFEST)
    with pytest.raises(RegistryRefused, match=r"MANIFEST_BLOB_UNKNOWN|MANIFEST_UNKNOWN"):
        repository.put_manifest(Index("", (missing,)).to_bytes(), INDEX, tag="v1")
    assert not repository.has("v1")


@pytest.mark.parametrize("reference", ["", "../x", "a b", "sha256:abc", "x" * 129])
def test_what_is_neither_tag_nor_digest_is_not_asked_for(registry: Registry, reference: str) -> None:
    with pytest.raises(UsageError, match="neither a tag nor"):
        registry.repository().manifest(reference)


def test_a_manifest_that_was_changed_on_the_registrys_disk_is_refused(tmp_path: Path) -> None:
    with registries.registry(tmp_path / "registry") as own:
        repository = own.repository()
        entry = put(repository, "honest", tag="v1")
        path = own.blob(entry.digest)
        path.write_bytes(path.read_bytes().replace(b"text/plain", b"text/PLAIN"))
        # Docker's registry notices by itself what others pass on; either way it is not taken
        with pytest.raises((VerificationFailed, NetworkFailed)):
            repository.manifest(entry.digest)


def test_a_changed_byte_on_the_way_is_noticed(registry: Registry) -> None:
    entry = put(registry.repository("flipped"), "hello", tag="v1")
    # where in the answer a byte is of the body and not of its headers depends on these: from the end on, then
    length = len(registry.repository("flipped").manifest(entry.digest))
    with FaultProxy(registry.port) as quiet:
        registry.repository("flipped", port=quiet.port).manifest(entry.digest)
    with FaultProxy(registry.port, Fault("flip", 600)) as proxy:
        repository = registry.repository("flipped", port=proxy.port)
        with pytest.raises(VerificationFailed, match="gave other bytes"):
            repository.manifest(entry.digest)
    assert length > 300


@pytest.mark.parametrize("kind", ["refuse", "cut", "reset"])
def test_a_request_that_is_cut_off_is_tried_again(registry: Registry, kind: str) -> None:
    entry = put(registry.repository("cut"), "hello", tag="v1")
    with FaultProxy(registry.port, Fault(kind), Fault(kind), Fault(kind)) as proxy:
        assert registry.repository("cut", port=proxy.port).has(entry.digest)
        assert proxy.left == 0


def test_a_registry_that_is_away_is_named_and_what_to_do(registry: Registry) -> None:
    with FaultProxy(registry.port, always=Fault("refuse")) as proxy:
        repository = registry.repository(port=proxy.port)
        with pytest.raises(NetworkFailed, match=f"localhost:{proxy.port}") as caught:
            repository.tags()
        assert proxy.connections >= repository.connection.attempts
    assert "is the network up" in caught.value.hint
    assert caught.value.exit_code == 20


def test_a_login_is_used_where_the_registry_wants_one(tmp_path: Path) -> None:
    with registries.registry(tmp_path / "registry", login=LOGIN) as own:
        assert put(own.repository(login=LOGIN), "hello", tag="v1")
        for login in (None, Credentials("engineer", "wrong")):
            with pytest.raises(RegistryRefused, match="login") as caught:
                own.repository(login=login).tags()
            assert f"docker login localhost:{own.port}" in caught.value.hint
            assert "wrong" not in str(caught.value)


def test_a_login_that_was_renewed_is_asked_for_again(tmp_path: Path) -> None:
    with registries.registry(tmp_path / "registry", login=LOGIN) as own:
        repository = own.repository()
        answers = [Credentials("engineer", "expired"), LOGIN]
        repository.connection.credentials = lambda _: answers.pop(0)
        assert repository.tags() == set()
        assert answers == []


def test_another_authoritys_certificate_is_refused(tmp_path: Path) -> None:
    with (
        registries.registry(tmp_path / "one", tls=True) as own,
        registries.registry(tmp_path / "two", tls=True) as other,
    ):
        assert own.repository().tags() == set()
        assert other.ca is not None
        for repository in (own.repository(ca=other.ca), replace(own, ca=None, scheme="https").repository()):
            with pytest.raises(NetworkFailed, match="cannot be trusted to be localhost") as caught:
                repository.tags()
            assert "--ca" in caught.value.hint


def test_certificates_that_are_not_there_are_named(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(UsageError, match="no certificates at"):
        registry.repository(ca=tmp_path / "none.pem")
