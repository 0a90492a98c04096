"""What is attached to a release's engines, in a real registry, and every way to forge it or take it away."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope

from cnncc.fleet.bom import BOM
from cnncc.fleet.evidence import SUMMARY, ReleaseEvidence, examine, release_evidence, write_documents
from cnncc.fleet.keys import Keys
from cnncc.fleet.provenance import (
    BUILDER,
    MODEL_DIGEST,
    PREDICATE,
    PROVENANCE,
    STATEMENT,
    Attester,
    statement,
    unrecorded,
)
from cnncc.fleet.publish import Published, check_bundles, publish
from cnncc.fleet.rollout import point, pointers
from cnncc.fleet.signing import Signing
from cnncc_runtime.bundle import read_bundle
from cnncc_runtime.digests import canonical_json, digest_bytes
from cnncc_runtime.errors import StorageFailed, UsageError, VerificationFailed
from cnncc_runtime.oci.formats import INDEX, MANIFEST, Index, describe, read_manifest
from cnncc_runtime.oci.registry import Repository
from cnncc_runtime.releases import EVIDENCE
from tests.fleet.test_publish import PI4, X86, bundle
from tests.oci import registries
from tests.oci.registries import Registry

NAMES = itertools.count()
MODEL = {"source": "model.py:build", "digest": digest_bytes(b"model"), "graph": digest_bytes(b"graph")}
TOOLS = {"cnncc": "0.1.0", "torch": "2.13.0"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@dataclass
class Team:
    """A publisher with a fleet of its own.

    Attributes:
        registry: The registry.
        folder: Of its keys and bundles.
        bundles: What it releases.
        now: What time it is.
    """

    registry: Registry
    folder: Path
    bundles: list[Path]
    now: datetime = datetime(2030, 1, 1, tzinfo=timezone.utc)
    name: str = field(default_factory=lambda: f"evidence{next(NAMES)}")
    signing: Signing = field(init=False)

    def __post_init__(self) -> None:
        keys = Keys(self.folder / "keys", lambda role: role)
        self.signing = Signing(self.registry.repository(f"{self.name}-tuf"), keys, now=lambda: self.now)
        self.signing.begin()
        self.signing.publish()

    @property
    def repository(self) -> Repository:
        return self.registry.repository(self.name)

    @property
    def attester(self) -> Attester:
        self.signing.load()
        return self.signing.attester()

    def release(self, version: str = "1.0.0") -> Published:
        return publish(check_bundles(self.bundles), self.repository, version, attester=self.attester)

    def show(self, version: str = "1.0.0") -> ReleaseEvidence:
        attester = self.attester
        return release_evidence(self.repository, version, attester, pointers(self.signing, self.name))

    def engines(self, version: str = "1.0.0") -> list[str]:
        """Return the digests of the engines of a release."""
        return [entry["digest"] for entry in json.loads(self.repository.manifest(version))["manifests"]]

    def referrer(self, engine: str, kind: str) -> str:
        [entry] = self.repository.referrers(engine, kind)
        return entry.digest

    def document(self, engine: str, kind: str) -> bytes:
        manifest = read_manifest(self.repository.manifest(self.referrer(engine, kind)))
        return self.repository.small_blob(manifest.layers[0], most=1 << 20)

    def relist(self, engine: str, *artifacts: bytes) -> None:
        """Have the registry list other artifacts for an engine; whoever may write to it can."""
        entries = []
        for data in artifacts:
            kind = read_manifest(data).artifact_type
            self.repository.put_manifest(data, MANIFEST)
            entries.append(describe(data, MANIFEST, artifact_type=kind))
        index = Index("", tuple(entries)).to_bytes()
        self.repository.put_manifest(index, INDEX, tag=engine.replace(":", "-"))

    def listed(self, engine: str, *, but: str = "") -> list[bytes]:
        """Return the manifests that refer to an engine."""
        entries = self.repository.referrers(engine)
        return [self.repository.manifest(entry.digest) for entry in entries if entry.artifact_type != but]

    def forged(self, engine: str, kind: str, data: bytes) -> bytes:
        """Store an artifact as the one of an engine, with another document; return its manifest."""
        old = read_manifest(self.repository.manifest(self.referrer(engine, kind)))
        layer = describe(data, old.layers[0].media_type, annotations=old.layers[0].annotations)
        from cnncc_runtime.oci.transfer import upload

        upload(self.repository, data, layer)
        return replace(old, layers=(layer,)).to_bytes()

    def refused(self, *words: str) -> None:
        """See that the release is refused in these words, and that publishing it again makes it good."""
        with pytest.raises(VerificationFailed, match="cannot be believed") as caught:
            self.show()
        assert caught.value.exit_code == 30
        said = "\n".join(caught.value.where)
        for word in words:
            assert word in said
        self.release()
        assert len(self.show().engines) == len(self.bundles)


@pytest.fixture
def team(registry: Registry, tmp_path: Path) -> Team:
    made = [bundle(tmp_path / "bundles", target, model=MODEL, toolchain=TOOLS) for target in (X86, PI4)]
    return Team(registry, tmp_path, made)


def test_every_engine_has_a_bill_of_materials_and_a_provenance_that_is_believed(team: Team) -> None:
    team.release()
    found = team.show()
    assert found.digest == digest_bytes(team.repository.manifest("1.0.0"))
    assert found.channels == ()
    assert {engine.bundle.target.device for engine in found.engines} == {"x86-64-v3", "raspberry-pi-4"}
    tagged = {digest_bytes(team.repository.manifest(tag)) for tag in team.repository.tags()}
    for engine in found.engines:
        assert {each.artifact_type for each in engine.examined.attached} == {STATEMENT, BOM, EVIDENCE}
        assert all(each.believed and each.size > 100 for each in engine.examined.attached)
        assert {each.digest for each in engine.examined.attached} <= tagged, "registries collect what has no tag"
        assert engine.bytes == sum(
            record.size for record in engine.bundle.files.values() if record.role in ("engine", "golden")
        )


def test_a_provenance_says_what_was_asked_for_and_what_it_was_made_of(team: Team) -> None:
    team.release()
    [path] = [each for each in team.bundles if "raspberry" in each.name]
    made = read_bundle(path)
    [engine] = [each for each in team.show().engines if each.bundle.target == PI4]
    envelope = json.loads(team.document(engine.examined.digest, STATEMENT))
    assert envelope["payloadType"] == STATEMENT
    said: dict[str, Any] = json.loads(Envelope.from_dict(envelope).payload)
    assert (said["_type"], said["predicateType"]) == ("https://in-toto.io/Statement/v1", PREDICATE)
    subjects = {each["name"]: each["digest"]["sha256"] for each in said["subject"]}
    assert subjects.pop("test@raspberry-pi-4") == engine.examined.digest[7:]
    assert subjects == {name: record.sha256[7:] for name, record in made.manifest.files.items()}
    build = said["predicate"]["buildDefinition"]
    assert build["externalParameters"]["source"] == "model.py:build"
    assert build["externalParameters"]["precision"] == "fp32"
    assert build["externalParameters"]["target"]["cpu"] == "cortex-a72"
    assert build["resolvedDependencies"] == [
        {"name": "model.py:build", "digest": {MODEL_DIGEST: MODEL["digest"][7:]}},
        {"name": "exported.onnx", "digest": {"sha256": MODEL["graph"][7:]}},
    ]
    details = said["predicate"]["runDetails"]
    assert details["builder"] == {"id": BUILDER, "version": TOOLS}
    assert details["metadata"]["invocationId"] == made.digest
    bom = team.document(engine.examined.digest, BOM)
    assert details["byproducts"][0]["digest"]["sha256"] == digest_bytes(bom)[7:]


def test_the_calibration_table_of_an_int8_engine_is_among_what_it_was_made_of(team: Team) -> None:
    made = read_bundle(team.bundles[0]).manifest
    table = replace(made.files["parity.json"], sha256=digest_bytes(b"table"))
    said = json.loads(statement(replace(made, files={**made.files, "calibration.json": table}), made.name, b""))
    dependencies = said["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert dependencies[-1] == {"name": "calibration.json", "digest": {"sha256": table.sha256[7:]}}


def test_publishing_again_attaches_the_same(team: Team) -> None:
    team.release()
    before = {engine: {*team.listed(engine)} for engine in team.engines()}
    assert team.release().sent == 0
    assert {engine: {*team.listed(engine)} for engine in team.engines()} == before


def test_an_engine_of_two_releases_has_one_provenance_and_the_tags_of_both_keep_it(team: Team) -> None:
    team.release()
    first = {engine: team.referrer(engine, STATEMENT) for engine in team.engines()}
    team.release("1.0.1")
    assert {engine: team.referrer(engine, STATEMENT) for engine in team.engines("1.0.1")} == first
    newer = {tag for tag in team.repository.tags() if tag.startswith("1.0.1-")}
    kept = {digest_bytes(team.repository.manifest(tag)) for tag in newer}
    assert {*first.values()} <= kept
    team.show()
    assert len(team.show("1.0.1").engines) == 2


@pytest.mark.parametrize("step", range(1, 9))
def test_a_publisher_that_was_cut_begins_again(team: Team, step: int) -> None:
    team.bundles, left = team.bundles[:1], step

    class Dying(Repository):
        def put_manifest(self, data: bytes, media_type: str, *, tag: str = "") -> str:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt
            return super().put_manifest(data, media_type, tag=tag)

    whole = replace(team, name=f"{team.name}-whole", folder=team.folder / "whole")
    dying = Dying(team.repository.place, team.repository.connection)
    with pytest.raises(KeyboardInterrupt):
        publish(check_bundles(team.bundles), dying, "1.0.0", attester=team.attester)
    assert not team.repository.has("1.0.0")
    team.release()
    publish(check_bundles(team.bundles), whole.repository, "1.0.0", attester=team.attester)
    for engine in team.engines():
        assert sorted(team.listed(engine)) == sorted(whole.listed(engine))
    assert len(team.show().engines) == 1


def test_a_channels_pointer_is_said_and_a_tag_that_was_moved_is_refused(team: Team) -> None:
    team.release()
    team.signing.load()
    point(team.signing, team.repository, "canary", team.name, "1.0.0")
    team.signing.publish()
    assert team.show().channels == ("canary",)
    publish(check_bundles(team.bundles[:1]), team.repository, "0.9", attester=team.attester)
    team.repository.put_manifest(team.repository.manifest("0.9"), INDEX, tag="1.0.0")
    with pytest.raises(VerificationFailed, match="another release than the one that canary points to"):
        team.show()


@pytest.mark.parametrize(
    ("kind", "words"),
    [(STATEMENT, "has no provenance"), (BOM, "has no bill of materials"), (EVIDENCE, "parity.json, reference.onnx")],
)
def test_what_was_taken_away_is_missed(team: Team, kind: str, words: str) -> None:
    team.release()
    for engine in team.engines():
        team.relist(engine, *team.listed(engine, but=kind))
    team.refused(words, "raspberry-pi-4", "x86-64-v3")


def test_a_list_that_was_taken_away_whole_is_missed(team: Team) -> None:
    team.release()
    team.relist(team.engines()[0])
    team.refused("has no provenance", "has no bill of materials")


def test_a_release_without_provenance_is_not_believed(team: Team) -> None:
    publish(check_bundles(team.bundles), team.repository, "1.0.0")
    team.refused("has no provenance: it was taken away, or never attached")


@pytest.mark.parametrize("change", ["payload", "signature", "type"])
def test_a_statement_that_was_changed_is_refused(team: Team, change: str) -> None:
    team.release()
    engine = team.engines()[0]
    envelope = Envelope.from_dict(json.loads(team.document(engine, STATEMENT)))
    if change == "payload":
        envelope.payload = envelope.payload.replace(b"model.py:build", b"other.py:build")
    elif change == "type":
        envelope.payload_type = "text/plain"
    else:
        [signature] = envelope.signatures.values()
        signature.signature = ("0" if signature.signature[0] != "0" else "1") + signature.signature[1:]
    forged = team.forged(engine, STATEMENT, canonical_json(envelope.to_dict()))
    team.relist(engine, *team.listed(engine, but=STATEMENT), forged)
    team.refused("'text/plain', and no statement" if change == "type" else "was changed, or the signature was")


@pytest.mark.parametrize("role", ["stable", "stranger"])
def test_a_statement_by_a_key_of_another_role_is_refused(team: Team, tmp_path: Path, role: str) -> None:
    team.release()
    engine = team.engines()[0]
    keys = team.signing.keys if role == "stable" else Keys(tmp_path / "strange", lambda role: role)
    known = keys.roles()[role] if role == "stable" else keys.create(role)
    named = {each.keyid: each.key for each in known}
    thief = Attester(named, 1, lambda: keys.signers(role, named))
    payload = Envelope.from_dict(json.loads(team.document(engine, STATEMENT))).payload
    forged = team.forged(engine, STATEMENT, thief.sign(payload))
    team.relist(engine, *team.listed(engine, but=STATEMENT), forged)
    team.refused(f"signed by {known[0].keyid[:16]}…, and the fleet's metadata names no such key")


def test_the_provenance_of_another_engine_is_refused(team: Team) -> None:
    team.release()
    engine, other = team.engines()
    # as it is, it refers to the other engine; made to refer to this one, its subjects are still the other's
    swapped = team.repository.manifest(team.referrer(other, STATEMENT))
    for listed, words in (
        (swapped, f"refers to {other[:19]}…, which is not this engine"),
        (team.forged(engine, STATEMENT, team.document(other, STATEMENT)), "it is of another engine: of test@"),
    ):
        team.relist(engine, *team.listed(engine, but=STATEMENT), listed)
        team.refused(words)
        team.relist(engine, *[data for data in team.listed(engine) if data != listed])


def test_a_bill_of_materials_of_somebody_else_is_refused(team: Team) -> None:
    team.release()
    engine = team.engines()[0]
    plain = json.loads(team.document(engine, BOM))
    plain["formulation"] = []
    forged = team.forged(engine, BOM, canonical_json(plain))
    team.relist(engine, *team.listed(engine, but=BOM), forged)
    team.refused("bill of materials", "is not the one that the provenance names")


def test_reports_that_were_changed_are_refused(team: Team) -> None:
    team.release()
    engine = team.engines()[0]
    old = read_manifest(team.repository.manifest(team.referrer(engine, EVIDENCE)))
    other = team.document(engine, BOM)  # a blob that is there
    layers = tuple(replace(layer, digest=digest_bytes(other), size=len(other)) for layer in old.layers)
    forged = replace(old, layers=layers).to_bytes()
    team.relist(engine, *team.listed(engine, but=EVIDENCE), forged)
    team.refused("its provenance names parity.json, reference.onnx: taken away, or others were put in their place")


def test_a_blob_that_was_changed_on_the_registrys_disk_is_refused(team: Team) -> None:
    team.release()
    engine = team.engines()[0]
    layer = read_manifest(team.repository.manifest(team.referrer(engine, STATEMENT))).layers[0]
    path = team.registry.blob(layer.digest)
    good = path.read_bytes()
    path.write_bytes(good[:-20] + bytes(20))
    with pytest.raises(VerificationFailed) as caught:
        team.show()
    assert "gave other bytes" in "\n".join(caught.value.where)
    path.write_bytes(good)
    team.show()


def test_what_else_is_attached_is_listed_and_changes_nothing(team: Team) -> None:
    team.release()
    engine = team.engines()[0]
    good = team.listed(engine)
    stranger = replace(read_manifest(good[0]), artifact_type="application/vnd.example.scan+json").to_bytes()
    rubbish = team.forged(engine, STATEMENT, b"{}")
    team.relist(engine, rubbish, stranger, *good)
    [found] = [each for each in team.show().engines if each.examined.digest == engine]
    said = {(each.artifact_type, each.believed) for each in found.examined.attached}
    assert ("application/vnd.example.scan+json", None) in said
    assert (STATEMENT, False) in said
    assert (STATEMENT, True) in said


def test_after_a_rotation_old_signatures_are_not_believed_and_publishing_again_signs_anew(team: Team) -> None:
    team.release()
    old = {engine: team.referrer(engine, STATEMENT) for engine in team.engines()}
    index = team.repository.manifest("1.0.0")
    team.signing.load()
    team.signing.rotate(PROVENANCE)
    team.signing.publish()
    team.refused("and the fleet's metadata names no such key")
    assert team.repository.manifest("1.0.0") == index, "devices do not see any of it"
    for engine in team.show().engines:
        by = {each.digest: each.believed for each in engine.examined.attached if each.artifact_type == STATEMENT}
        assert by.pop(old[engine.examined.digest]) is False
        assert list(by.values()) == [True]


def test_keys_that_are_not_here_sign_nothing(team: Team) -> None:
    attester = team.attester
    for path in (team.folder / "keys").glob(f"{PROVENANCE}-*.pem"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(UsageError, match="provenance needs 1 keys to sign, 0 of its 1 are here"):
            publish(check_bundles(team.bundles), team.repository, "1.0.0", attester=attester)
        (team.folder / "keys" / "keys.json").write_text("{}")
    assert not team.repository.has("1.0.0")


def test_metadata_that_has_expired_names_no_keys_that_count(team: Team) -> None:
    team.signing.load()
    team.signing.check_dates()
    team.now += timedelta(days=2)
    with pytest.raises(VerificationFailed, match=r"has expired.*: timestamp") as caught:
        team.signing.check_dates()
    assert "trust refresh NAME timestamp" in caught.value.hint


def test_provenance_is_no_channel(team: Team) -> None:
    team.signing.load()
    assert team.signing.channels == ("stable", "canary")
    with pytest.raises(UsageError, match="no channel 'provenance'"):
        team.signing.release(PROVENANCE, "vision", b"", {})
    assert PROVENANCE in {role.name for role in team.signing.overview()}
    fresh = Signing(team.registry.repository(f"{team.name}-new-tuf"), team.signing.keys)
    for name in (PROVENANCE, "root", "timestamp"):
        with pytest.raises(UsageError, match=f"{name} cannot be a channel"):
            fresh.begin(("stable", name))


def test_a_bundle_that_does_not_record_its_build_is_named(registry: Registry, tmp_path: Path) -> None:
    path = bundle(tmp_path / "bundles", X86, model={}, toolchain={})
    team = Team(registry, tmp_path, [path])
    assert team.release().unrecorded == {path.name: ("a digest of the model", "the tools that built it")}
    [engine] = team.show().engines
    assert engine.examined.provenance is not None
    assert (engine.examined.provenance.source, dict(engine.examined.provenance.tools)) == ("", {})
    assert unrecorded(replace(engine.bundle, model=MODEL, toolchain=TOOLS)) == ()


def test_documents_are_written_whole_under_plain_names(team: Team, tmp_path: Path) -> None:
    odd = bundle(tmp_path / "odd", replace(X86, device="../x y"), model=MODEL, toolchain=TOOLS)
    team.bundles = [odd, team.bundles[1]]
    team.release()
    found = team.show()
    names = write_documents(found, tmp_path / "out", {"version": "1.0.0"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len(names) == 5
    for engine in found.engines:
        assert "/" not in engine.label
        assert (tmp_path / "out" / f"{engine.label}.cdx.json").read_bytes() == team.document(
            engine.examined.digest, BOM
        )
        envelope = (tmp_path / "out" / f"{engine.label}.intoto.jsonl").read_bytes()
        assert team.attester.read(envelope) == engine.examined.provenance
    assert write_documents(found, tmp_path / "out", {"version": "1.0.0"}) == names
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(StorageFailed, match=f"holds no {SUMMARY}"):
        write_documents(found, mine, {})
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_skopeo_mirrors_a_release_with_all_that_is_attached(team: Team, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("skopeo not found: apt-get install skopeo")
    team.release()
    there, mirror = team.name, f"mirror/{team.name}"
    host = f"localhost:{team.registry.port}"
    options = ["--all", "--src-tls-verify=false", "--dest-tls-verify=false"]
    copy = ["skopeo", "--insecure-policy", "copy", *options]
    subprocess.run(
        [*copy, "--preserve-digests", f"docker://{host}/{there}:1.0.0", f"docker://{host}/{mirror}:1.0.0"], check=True
    )
    copied = team.registry.repository(mirror)
    assert copied.manifest("1.0.0") == team.repository.manifest("1.0.0")
    with pytest.raises(VerificationFailed) as caught:
        release_evidence(copied, "1.0.0", team.attester, ())
    assert "has no provenance" in caught.value.where[0], "a copy of the release alone leaves behind what refers to it"
    # a skopeo this old rewrites the lists of what refers to an engine, without types: nothing relies on them
    for tag in sorted(team.repository.tags()):
        subprocess.run([*copy, f"docker://{host}/{there}:{tag}", f"docker://{host}/{mirror}:{tag}"], check=True)
    assert release_evidence(copied, "1.0.0", team.attester, ()) == team.show()


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(canonical_json)))
def test_any_bytes_are_a_provenance_or_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        Attester({}, 1, list).read(data)


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"[" * 50_000, b"\xff", b'{"_type":"x","subject":[],"predicateType":"y","predicate":{}}']
)
def test_what_was_signed_and_is_no_provenance_is_refused(team: Team, payload: bytes) -> None:
    attester = team.attester
    with pytest.raises(VerificationFailed, match="what was signed is no provenance"):
        attester.read(attester.sign(payload))
    other = json.loads(statement(read_bundle(team.bundles[0]).manifest, digest_bytes(b""), b""))
    other["predicateType"] = "https://slsa.dev/verification_summary/v1"
    with pytest.raises(VerificationFailed, match="no provenance of an engine"):
        attester.read(attester.sign(canonical_json(other)))


def test_examining_names_an_engine_that_is_none(team: Team) -> None:
    team.release()
    digest = digest_bytes(team.repository.manifest("1.0.0"))
    with pytest.raises(VerificationFailed, match="not a manifest"):
        examine(team.repository, digest, team.attester)
